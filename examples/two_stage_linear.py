"""The textbook example: two linear layers on two devices, trained with microbatches.

    python examples/two_stage_linear.py                                # one process, both stages
    torchrun --nproc-per-node 2 examples/two_stage_linear.py           # one process per stage

The stages live on two GPUs where there are two, else on the CPU. Cut by hand or automatically, the
pipeline learns exactly what the whole model learns.
"""

import torch
from torch import Tensor, nn

import evenflow

DEVICE = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
NUM_MICROBATCHES = 4
NUM_STEPS = 10


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(1024, 2048)
        self.relu = nn.ReLU()
        self.layer2 = nn.Linear(2048, 1024)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer2(self.relu(self.layer1(x)))
        return output


def loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(microbatch["x"]), microbatch["y"])


def make_model() -> TwoLayers:
    torch.manual_seed(0)  # the same weights every time
    return TwoLayers()


def make_batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(32, 1024), "y": torch.randn(32, 1024)} for _ in range(NUM_STEPS)]


def train_pipeline(split: list[str] | None) -> dict[str, Tensor]:
    """Train the model in two stages; `split` names the module before which to cut, None lets Evenflow choose."""
    batches = make_batches()
    pipe = evenflow.pipeline(
        make_model(),
        loss=loss,
        example=batches[0],
        optimizer=lambda named_parameters: torch.optim.SGD(named_parameters, lr=0.1),
        stages=2,
        split=split,
        num_microbatches=NUM_MICROBATCHES,
        device=DEVICE,
    )
    output = pipe.predict(batches[0], lambda model, microbatch: model(microbatch["x"]))
    losses = [float(pipe.step(batch).loss) for batch in batches]
    if pipe.is_main:
        for stage in pipe.cut:
            print(f"  stage {stage.stage}: {stage.first} ... {stage.last}, {stage.num_parameters:,} parameters")
        print(f"  output {tuple(output.shape)}, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {name: parameter.detach().cpu() for name, parameter in pipe.named_parameters()}


def train_whole() -> dict[str, Tensor]:
    """Train the same model in one piece, in plain PyTorch, over the same microbatches."""
    model = make_model().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches():
        optimizer.zero_grad()
        for x, y in zip(batch["x"].chunk(NUM_MICROBATCHES), batch["y"].chunk(NUM_MICROBATCHES), strict=True):
            (loss(model, {"x": x.to(DEVICE), "y": y.to(DEVICE)}) / NUM_MICROBATCHES).backward()
        optimizer.step()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    whole = train_whole()
    for title, split in (("by hand, after the ReLU", ["layer2"]), ("automatically", None)):
        print(f"cut {title}:")
        trained = train_pipeline(split)  # under torchrun: this process's stage
        same = all(torch.equal(parameter, whole[name]) for name, parameter in trained.items())
        print(f"  same weights as the whole model: {same}")
