"""The model that `torture.py` trains: small, with dropout, and an op that ends its process when told to."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, ROWS = 16, 8


def _place() -> tuple[Path, str]:
    return Path(os.environ["TORTURE_FOLDER"]), os.environ.get("RANK", "none")


def _obey() -> None:
    """Die, if the order in the rank's file says: at once, or so many calls later."""
    folder, rank = _place()
    order = folder / f"order-{rank}"
    if order.exists():
        left = int(order.read_text() or 0)
        if left <= 0:
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        order.write_text(str(left - 1))


class _Obey(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:  # torch types no context
        """The same numbers."""
        _obey()
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """The same gradient."""
        _obey()
        return gradients[0]


class Block(nn.Module):
    """A layer that may end its process, in its forward or its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, WIDTH) to (rows, WIDTH)."""
        same: torch.Tensor = _Obey.apply(x)  # type: ignore[no-untyped-call]  # torch types no `apply`
        found: torch.Tensor = self.drop(torch.tanh(self.linear(same)))
        return found


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(batch["x"])
    return nn.functional.mse_loss(found, batch["y"])


def build() -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """The model, its loss function and its batch; the process says where it is."""
    folder, rank = _place()
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    model = nn.Sequential(*(Block() for _ in range(8)), nn.Linear(WIDTH, 1))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, size, generator=generator) for size in (WIDTH, 1))
    return model, _loss, {"x": x, "y": y}
