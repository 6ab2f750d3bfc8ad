"""The textbook example: two linear layers on two devices, trained with microbatches.

    python examples/two_stage_linear.py                                # one process, both stages
    torchrun --nproc-per-node 2 examples/two_stage_linear.py           # one process per stage

On two GPUs, or else on the CPU; cut by hand or automatically: it learns exactly what the whole model does.
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


def make_model_and_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)  # the same numbers every time
    return TwoLayers(), {"x": torch.randn(32, 1024), "y": torch.randn(32, 1024)}


def train_pipeline(split: list[str] | None) -> dict[str, Tensor]:
    """Train in two stages; `split` names the module before which to cut, None lets Evenflow choose."""
    model, batch = make_model_and_batch()
    pipe = evenflow.pipeline(
        model,
        loss=loss,
        example=batch,
        optimizer=lambda named_parameters: torch.optim.SGD(named_parameters, lr=10.0),
        stages=2,
        split=split,
        num_microbatches=NUM_MICROBATCHES,
        device=DEVICE,
    )
    output = pipe.predict(batch, lambda model, microbatch: model(microbatch["x"]))
    losses = [float(pipe.step(batch).loss) for _ in range(NUM_STEPS)]
    if pipe.is_main:
        print(*(f"  stage {stage.stage}: {stage.first} ... {stage.last}" for stage in pipe.cut), sep="\n")
        print(f"  output {tuple(output.shape)}, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {name: parameter.detach().cpu() for name, parameter in pipe.named_parameters()}


def train_whole() -> dict[str, Tensor]:
    """Train the same model in one piece, in plain PyTorch, over the same microbatches."""
    model, batch = make_model_and_batch()
    model.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        for x, y in zip(batch["x"].chunk(NUM_MICROBATCHES), batch["y"].chunk(NUM_MICROBATCHES), strict=True):
            (loss(model, {"x": x.to(DEVICE), "y": y.to(DEVICE)}) / NUM_MICROBATCHES).backward()
        optimizer.step()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    whole = train_whole()
    for title, split in {"by hand, after the ReLU": ["layer2"], "automatically": None}.items():
        print(f"cut {title}:")
        trained = train_pipeline(split)  # under torchrun: this process's stage alone
        same = all(torch.equal(parameter, whole[name]) for name, parameter in trained.items())
        print(f"  same weights as the whole model: {same}")
