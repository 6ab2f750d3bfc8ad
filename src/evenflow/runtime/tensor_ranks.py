"""Tensor ranks: processes that share the layers of the same stages, and must agree on what each has whole."""

from collections.abc import Collection, Iterable

import torch

from evenflow.graph.dtensors import is_dtensor
from evenflow.runtime.data_ranks import Named, tell
from evenflow.runtime.world import World


class TensorRanks:
    """Those of this process. `partial`: parameters that each has whole, with a part of their gradients."""

    def __init__(self, world: World, partial: Collection[str]) -> None:
        self._world, self._partial = world, partial

    def begin(self, named: Iterable[Named]) -> None:
        """Let all have the first one's numbers of what each has whole; collective."""
        if self._world.size > 1:
            tell(self._world, [each for each in named if not is_dtensor(each[1])], lambda _: 0)

    def settle(self, named: Iterable[Named]) -> None:
        """Let these parameters' gradients, which are whole in time, be so on every rank; collective."""
        if self._world.size == 1:
            return
        for name, parameter in named:
            if name in self._partial:
                self._add_up(parameter)
            gradient = parameter.grad
            if gradient is not None and is_dtensor(parameter) and is_dtensor(gradient):
                # Where its placements differ it is a sum that nobody has added up yet.
                parameter.grad = gradient.redistribute(placements=parameter.placements)

    def _add_up(self, parameter: torch.nn.Parameter) -> None:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            work = self._world.add_up(gradient)
            if work is not None:
                work.wait()
            parameter.grad = gradient

    def answers(self, parameter: torch.Tensor) -> bool:
        """Whether of these ranks this one tells others of a parameter and its gradient."""
        return self._world.rank == 0 or is_dtensor(parameter)
