"""Where a stage's autograd graph begins and ends.

A received value enters through `Boundary`, which catches its gradient as autograd hands it over: summed, and
with its own strides. (A leaf's `.grad` would not do: accumulation copies it into the leaf's layout, and the
kernels of the stage before may then add in another order.) The boundary's result is also the root at which a
gradient relayed from a later stage enters, so that it is the first term of the sum, as in the unsplit
program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Boundary(torch.autograd.Function):
    """Identity that delivers the gradient of what was received to `sink[value]` and ends the graph there.

    The first input is an empty leaf that wants a gradient, so that the graph begins here; it gets none. The
    received tensor itself is no leaf: that would be held until the backward, needed or not.
    """

    @staticmethod
    def forward(
        ctx: Any, _: torch.Tensor, received: torch.Tensor, value: int, sink: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        ctx.value, ctx.sink = value, sink
        ctx.set_materialize_grads(False)
        return received.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None, None]:
        (gradient,) = gradients
        if gradient is not None:
            ctx.sink[ctx.value] = gradient
        return None, None, None, None


def receive(
    tensor: torch.Tensor, value: int, sink: dict[int, torch.Tensor], anchor: torch.Tensor
) -> torch.Tensor:
    """A received tensor as the start of this stage's graph, which ends in `anchor`, an empty leaf."""
    return Boundary.apply(anchor, tensor, value, sink)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves `apply` untyped


def root_of(tensor: torch.Tensor) -> GradientEdge | None:
    """Where a gradient of the tensor enters the graph; None where it has none. Does not hold the tensor.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> root_of(weight * 2).node.name(), root_of(torch.ones(2))
    ('MulBackward0', None)
    """
    # A view taken without gradients says that it wants one, and has no part in the graph.
    apart = not tensor.requires_grad or (tensor.grad_fn is None and tensor._is_view())  # noqa: SLF001 (it has no other name)
    return None if apart else get_gradient_edge(tensor)


@dataclass(slots=True)
class Walk:
    """A backward that is ready to be run: where it starts, and with which gradients."""

    roots: list[GradientEdge]
    gradients: list[torch.Tensor]

    def run(self) -> None:
        """Walk the whole graph, which ends its life."""
        if self.roots:
            # As `torch.autograd.backward`, whose own checks take as long as a small stage's kernels: the
            # engine checks the gradients once more.
            engine = torch.autograd.Variable._execution_engine  # noqa: SLF001
            engine.run_backward(
                *(tuple(self.roots), tuple(self.gradients), False, False, ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def run_to(self, leaves: Sequence[torch.Tensor]) -> None:
        """Walk to these leaves alone."""
        torch.autograd.backward(self.roots, self.gradients, inputs=leaves)
