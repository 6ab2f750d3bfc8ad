"""Data ranks: replicas of a stage, which take other microbatches and must end a step with the same numbers.

Gradients are summed by a reducer of our own. Those of torch are hooks that fire when a parameter gets its
gradient, and here most of that is put off (`weight_grads`): a stage is summed when its last weight gradient
is done, as the program says (`ReduceGrads`), while other stages go on. They travel in buckets, several at a
time (Li et al., "PyTorch Distributed", 2020).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from evenflow.runtime.ranks.sums import Named, Sum, buckets_of, tell
from evenflow.runtime.ranks.world import World

# A parameter's gradient as this rank's data ranks sum it: whole, where tensor ranks have parts of it. Asked
# once for each parameter when its gradient is whole in time; collective among the tensor ranks.
Settled: TypeAlias = Callable[[str, torch.nn.Parameter], torch.Tensor | None]


class DataRanks(ABC):
    """What the replicas of this process's stages do together, in each step."""

    @abstractmethod
    def expect(self, order: Sequence[int]) -> None:
        """A step begins, in which stages are to be summed in this order, alike on all ranks."""

    @abstractmethod
    def gather(self, stage: int) -> None:
        """A stage is about to compute: have all of its parameters."""

    @abstractmethod
    def reduce(self, stage: int) -> None:
        """The last gradient of a stage is there: begin to sum them."""

    @abstractmethod
    def release(self) -> None:
        """The program has ended: let go of the parameters that others hold."""

    @abstractmethod
    def finish(self) -> None:
        """Sum what has not been, and wait until every gradient is the sum of all ranks'."""

    @abstractmethod
    def clear(self) -> None:
        """Forget gradients that are not summed yet."""

    @abstractmethod
    def summed(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """A parameter's gradient, of all ranks, while it is not reduced yet; nothing is changed."""

    @abstractmethod
    def updates(self, name: str) -> bool:
        """Whether this rank updates a parameter, and holds what an optimizer keeps for it."""

    @abstractmethod
    def answers(self, name: str) -> bool:
        """Whether this rank tells others of a parameter and of its gradient: no other has what it has."""

    @abstractmethod
    def spread(self) -> None:
        """Parameters were updated, each where it is: let all ranks have the new numbers."""


class OneDataRank(DataRanks):
    """There are no replicas; see `Settled`."""

    def __init__(self, named: Sequence[Named] = (), settled: Settled = lambda _, each: each.grad) -> None:
        self._named, self._settled = named, settled

    def expect(self, order: Sequence[int]) -> None:
        pass

    def gather(self, stage: int) -> None:
        raise AssertionError(f"stage {stage}: there is one replica, so that no program is lowered so")

    def reduce(self, stage: int) -> None:
        raise AssertionError(f"stage {stage}: there is one replica, so that no program is lowered so")

    def release(self) -> None:
        pass

    def finish(self) -> None:
        for name, parameter in self._named:
            parameter.grad = self._settled(name, parameter)

    def clear(self) -> None:
        pass

    def summed(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._settled(name, parameter)

    def updates(self, name: str) -> bool:
        return True

    def answers(self, name: str) -> bool:
        return True

    def spread(self) -> None:
        pass


class Turns:
    """In which order stages are summed: the same on all ranks, whose programs may end them in another.

    >>> turns = Turns()
    >>> turns.expect([1, 0])
    >>> list(turns.ready(0)), list(turns.ready(1)), list(turns.rest())
    ([], [1, 0], [])
    """

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._ready: set[int] = set()

    def expect(self, order: Sequence[int]) -> None:
        """Begin anew."""
        self._order = deque(order)
        self._ready.clear()

    def ready(self, stage: int) -> Iterator[int]:
        """A stage is ready: those whose turn has come."""
        self._ready.add(stage)
        while self._order and self._order[0] in self._ready:
            yield self._order.popleft()

    def rest(self) -> Iterator[int]:
        """Those that have not had theirs."""
        while self._order:
            yield self._order.popleft()


class Replicated(DataRanks):
    """Every rank has all parameters of its stages.

    With `shares_states` (ZeRO-1: Rajbhandari et al., 2020) each parameter is updated by one of them, which
    alone gets its gradient and holds the optimizer's states, and then tells the others: whole parameters
    are dealt out, so that any optimizer will do. `parameters` are those of each stage that may be trained,
    `late` those whose gradients are whole only when the program has ended; see also `Settled`.
    """

    def __init__(
        self,
        world: World,
        parameters: Mapping[int, Sequence[Named]],
        *,
        shares_states: bool,
        late: Callable[[str], bool],
        settled: Settled,
    ) -> None:
        self._world, self._parameters, self._late, self._settled = world, parameters, late, settled
        self._updater = _dealt(parameters, world.size) if shares_states else {}
        self._turns = Turns()
        self._sums: list[Sum] = []

    def expect(self, order: Sequence[int]) -> None:
        self._turns.expect(order)

    def gather(self, stage: int) -> None:
        raise AssertionError(f"stage {stage}: every rank has all of it")

    def reduce(self, stage: int) -> None:
        for at in self._turns.ready(stage):
            self._begin(each for each in self._parameters[at] if not self._late(each[0]))

    def release(self) -> None:
        pass

    def finish(self) -> None:
        for stage in self._turns.rest():
            self._begin(each for each in self._parameters[stage] if not self._late(each[0]))
        self._begin(each for named in self._parameters.values() for each in named if self._late(each[0]))
        while self._sums:
            self._sums.pop(0).finish(self._world.rank)

    def clear(self) -> None:
        self._sums.clear()

    def summed(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        kept, found = parameter.grad, self._settled(name, parameter)
        parameter.grad = None if found is None else found.clone()
        Sum.begun(self._world, [parameter], None).finish(self._world.rank)
        total, parameter.grad = parameter.grad, kept
        return total

    def updates(self, name: str) -> bool:
        return self._updater.get(name, self._world.rank) == self._world.rank

    def answers(self, name: str) -> bool:
        return self._updater.get(name, 0) == self._world.rank

    def spread(self) -> None:
        if self._updater:
            every = (each for stage in self._parameters.values() for each in stage)
            named = [(name, parameter) for name, parameter in every if parameter.requires_grad]
            tell(self._world, named, self._updater.__getitem__)

    def _begin(self, named: Iterable[Named]) -> None:
        """Let the gradients of these parameters travel."""
        by_target: dict[tuple[int | None, torch.dtype], list[torch.nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                parameter.grad = self._settled(name, parameter)
                by_target.setdefault((self._updater.get(name), parameter.dtype), []).append(parameter)
        for (target, _), parameters in by_target.items():
            for bucket in buckets_of(parameters):
                self._sums.append(Sum.begun(self._world, bucket, target))


def _dealt(parameters: Mapping[int, Sequence[Named]], num_ranks: int) -> dict[str, int]:
    """Which rank updates which parameter: the largest first, each to whoever has the least yet."""
    named = sorted(
        (each for stage in parameters.values() for each in stage),
        key=lambda each: (-each[1].numel(), each[0]),
    )
    loads, found = [0] * num_ranks, {}
    for name, parameter in named:
        rank = loads.index(min(loads))
        found[name] = rank
        loads[rank] += parameter.numel() * parameter.requires_grad
    return found
