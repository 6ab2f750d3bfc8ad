"""A small U-Net in three stages: its skip connections jump over the stage between.

    python examples/unet.py                                        # one process, all three stages
    torchrun --nproc-per-node 3 examples/unet.py                   # one process per stage

It learns to tell discs from a noisy ground, in pictures made up here. The model is written as anywhere else:
a value that a later stage needs is sent there, whichever stages lie between, and its gradient comes back.
"""

import torch
from torch import Tensor, nn

import evenflow

SIZE = 32  # of a picture, in pixels
NUM_STEPS = 40


def convolutions(inside: int, outside: int) -> nn.Sequential:
    """Two convolutions; GroupNorm, because BatchNorm's statistics would be those of a microbatch."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1),
        nn.GroupNorm(4, outside),
        nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = convolutions(1, width)
        self.down2 = convolutions(width, 2 * width)
        self.bottom = convolutions(2 * width, 4 * width)
        self.widen2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = convolutions(4 * width, 2 * width)
        self.widen1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = convolutions(2 * width, width)
        self.output = nn.Conv2d(width, 1, 1)

    def forward(self, picture: Tensor) -> Tensor:
        fine = self.down1(picture)
        coarse = self.down2(nn.functional.max_pool2d(fine, 2))
        x = self.bottom(nn.functional.max_pool2d(coarse, 2))
        x = self.up2(torch.cat([coarse, self.widen2(x)], dim=1))
        x = self.up1(torch.cat([fine, self.widen1(x)], dim=1))
        logits: Tensor = self.output(x)
        return logits


def loss(model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and beside it how many pixels are in both discs, the predicted and the true, or in either."""
    logits, disc = model(microbatch["picture"]), microbatch["disc"]
    predicted, true = logits > 0, disc > 0
    counts = {"both": (predicted & true).sum(), "either": (predicted | true).sum()}
    return nn.functional.binary_cross_entropy_with_logits(logits, disc), counts


def pictures(number: int) -> dict[str, Tensor]:
    """Discs of any place and size in noise: (number, 1, SIZE, SIZE), and where they are."""
    places, radii = SIZE * torch.rand(number, 2, 1, 1), 4 + 6 * torch.rand(number, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    distances = ((rows - places[:, 0]) ** 2 + (columns - places[:, 1]) ** 2).sqrt()
    disc = (distances < radii).float()[:, None]
    return {"picture": disc + 0.7 * torch.randn(number, 1, SIZE, SIZE), "disc": disc}


def main() -> None:
    torch.manual_seed(0)
    loader = [pictures(16) for _ in range(NUM_STEPS)]
    pipe = evenflow.pipeline(
        UNet(),
        loss=loss,
        example=loader[0],
        optimizer=lambda named_parameters: torch.optim.AdamW(named_parameters, lr=1e-2),
        split=["bottom", "widen1"],  # the modules with which the second and the third stage begin
        num_microbatches=4,
        device="cuda" if torch.cuda.device_count() >= 3 else "cpu",
    )
    if pipe.is_main:
        for stage in pipe.cut:
            print(f"stage {stage.stage}: {stage.first} ... {stage.last}, sends {stage.num_sent} tensors")
    for number, batch in enumerate(pipe.feed(loader), start=1):
        result = pipe.step(batch)
        if pipe.is_main and (number == 1 or number % 10 == 0):
            share = int(result.metrics["both"]) / max(1, int(result.metrics["either"]))
            print(f"step {number}: loss {float(result.loss):.3f}, discs overlap by {share:.0%}")


if __name__ == "__main__":
    main()
