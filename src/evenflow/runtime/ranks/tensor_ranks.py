"""Tensor ranks: processes that share the layers of the same stages, and must agree on what each has whole."""

from collections.abc import Collection, Iterable

import torch

from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.runtime.ranks.sums import Named, tell
from evenflow.runtime.ranks.world import World


class TensorRanks:
    """Those of this process. `partial`: parameters that each has whole, with a part of their gradients."""

    def __init__(self, world: World, partial: Collection[str]) -> None:
        self._world, self._partial = world, partial

    def begin(self, named: Iterable[Named]) -> None:
        """Let all have the first one's numbers of what each has whole; collective."""
        if self._world.size > 1:
            tell(self._world, [each for each in named if not is_dtensor(each[1])], lambda _: 0)

    def settled(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """A parameter's gradient, whole where each of these ranks has a part of it; nothing is changed."""
        gradient = parameter.grad
        if self._world.size == 1 or gradient is None:  # they run the same: none has any
            return gradient
        if name in self._partial:
            total = gradient.clone()
            self._world.add_up(total).wait()
            return total
        if is_dtensor(parameter) and is_dtensor(gradient):
            # Where its placements differ it is a sum that nobody has added up yet.
            return gradient.redistribute(placements=parameter.placements)
        return gradient

    def answers(self, parameter: torch.Tensor) -> bool:
        """Whether of these ranks this one tells others of a parameter and its gradient."""
        return self._world.rank == 0 or is_dtensor(parameter)
