"""Devices that sleep instead of computing, so that more of them fit on a machine than it has cores.

A stage sleeps in its forward, in the gradient of its input and in that of its weight. A wake-up that comes
late is repaid by the next sleep: the device does its work at its pace, and what the runtime takes between
two sleeps comes on top, as it does on a real one.
"""

import ctypes
import time
from typing import Any

import torch
from torch import nn

_SET_TIMER_SLACK = 29  # <linux/prctl.h>


class _Device:
    """The device of this process."""

    def __init__(self) -> None:
        self.late_seconds = 0.0
        self.is_on = False
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1)

    def work(self, seconds: float) -> None:
        """Be busy for so long."""
        if not self.is_on or not seconds:
            return
        end = time.perf_counter() + seconds - self.late_seconds
        left = end - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self.late_seconds = time.perf_counter() - end


DEVICE = _Device()


class _Work(torch.autograd.Function):
    """Hands on what it is given. `product` has the weight's part of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        product: torch.Tensor,  # noqa: ARG004
        seconds: tuple[float, float],
    ) -> torch.Tensor:
        forward, ctx.seconds = seconds
        DEVICE.work(forward)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        DEVICE.work(ctx.seconds)
        ctx.seconds = 0.0  # torch comes here once more on its way to the weight
        return grads[0], grads[0].as_strided((1, 1), (1, 1)), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        DEVICE.work(ctx.seconds)
        return grads[0], None


class Stage(nn.Module):
    """Takes so many seconds for each of its three passes, and hands on what it is given."""

    def __init__(self, seconds: tuple[float, float, float]) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.one: torch.Tensor
        self.register_buffer("one", torch.ones(1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same."""
        forward, of_input, of_weight = self.seconds
        product = nn.functional.linear(self.one, _Weight.apply(self.weight, of_weight))  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        return _Work.apply(x, product, (forward, of_input))  # type: ignore[no-untyped-call, no-any-return]  # as above


def model(num_stages: int, seconds: tuple[float, float, float]) -> nn.Sequential:
    """So many stages of these seconds."""
    return nn.Sequential(*(Stage(seconds) for _ in range(num_stages)))
