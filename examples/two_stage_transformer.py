"""A small transformer in two stages: embedding and first layers | remaining layers and output.

    python examples/two_stage_transformer.py                           # one process, both stages
    torchrun --nproc-per-node 2 examples/two_stage_transformer.py      # one process per stage

It learns to write a row of numbers backwards, on two GPUs where there are two, else on the CPU.
"""

import torch
from torch import Tensor, nn

import evenflow

DEVICE = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
NUM_SYMBOLS = 10
LENGTH = 8
NUM_STEPS = 60


class Reverser(nn.Module):
    def __init__(self, width: int = 64, num_layers: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(NUM_SYMBOLS, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, NUM_SYMBOLS)

    def forward(self, row: Tensor) -> Tensor:
        x = self.symbols(row) + self.positions(torch.arange(LENGTH, device=row.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


def loss(model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and beside it a metric: the share of symbols that are right."""
    logits, target = model(microbatch["row"]), microbatch["row"].flip(1)
    right = (logits.argmax(-1) == target).float().mean(1)
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()), {"right": right}


def main() -> None:
    torch.manual_seed(0)
    loader = [{"row": torch.randint(NUM_SYMBOLS, (64, LENGTH))} for _ in range(NUM_STEPS)]
    pipe = evenflow.pipeline(
        Reverser(),
        loss=loss,
        example=loader[0],
        optimizer=lambda named_parameters: torch.optim.AdamW(named_parameters, lr=1e-3),
        split=["layers.2"],  # the second stage begins with this module
        schedule="1f1b",
        num_microbatches=4,
        device=DEVICE,
    )
    if pipe.is_main:
        for stage in pipe.cut:
            print(f"stage {stage.stage}: {stage.first} ... {stage.last}, {stage.num_parameters:,} parameters")
    for number, batch in enumerate(pipe.feed(loader), start=1):
        result = pipe.step(batch)
        if pipe.is_main and (number == 1 or number % 20 == 0):
            right = result.metrics["right"].mean()
            print(f"step {number}: loss {float(result.loss):.3f}, {right:.0%} right")


if __name__ == "__main__":
    main()
