"""Programs: a schedule function asked for as many microbatches as a step has, lowered and proven.

A stage stays where it is: whatever the number of microbatches, the function must give the same placement, and
evaluation runs on it too. Ranks that follow different schedules could pass each other wrong values, so they
compare each new one before it runs.
"""

import hashlib
from collections.abc import Iterator, Sequence

from evenflow.errors import ConfigError, EvenflowError, PeerError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.lower import lower
from evenflow.runtime.ranks.world import World
from evenflow.schedules.catalog import ScheduleFunction
from evenflow.schedules.forward_only import forward_only_on
from evenflow.validate import ProvenProgram, prove


class Programs:
    """The proven programs of one pipeline, made when they are first asked for.

    With `unshard` they gather the parameters of each stage from data ranks. `example` is the schedule of the
    first batch, which decides where the stages live; by `costs`, where they are known, transfers are placed.
    The builder compares both between ranks. Raises `ConfigError` for a function that fails or returns no
    schedule of these sizes.

    >>> from evenflow.runtime.ranks.world import SingleProcess
    >>> from evenflow.schedules.gpipe import gpipe
    >>> programs = Programs(SingleProcess(), gpipe, num_ranks=2, stages_per_rank=1, num_microbatches=4)
    >>> programs.placement.rank_of
    (0, 1)
    >>> len(programs.evaluation(4, Flow.chain(2)).order)
    16
    """

    def __init__(
        self,
        world: World,
        method: ScheduleFunction,
        *,
        num_ranks: int,
        stages_per_rank: int,
        num_microbatches: int,
        unshard: bool = False,
        costs: Costs | None = None,
    ) -> None:
        self._world, self._method, self._unshard, self.costs = world, method, unshard, costs
        self._num_ranks, self._stages_per_rank = num_ranks, stages_per_rank
        self._proven: dict[tuple[str, int, Flow], ProvenProgram] = {}
        self.example = self._made(num_microbatches)
        self._schedules = {num_microbatches: self.example}

    @property
    def placement(self) -> Placement:
        """Where each stage lives."""
        return self.example.placement

    def training(self, num_microbatches: int, flow: Flow) -> ProvenProgram:
        """Return the program of a step; collective where the number of microbatches is new.

        Raises `ScheduleError` listing all faults of a wrong schedule, `ConfigError` where ranks disagree, and
        `PeerError` where another rank has none.
        """
        return self._training("training", num_microbatches, flow)

    def reducing(self, num_microbatches: int, flow: Flow) -> ProvenProgram:
        """Return the program of a step that ends with the gradients of all data ranks; as `training`."""
        return self._training("reducing", num_microbatches, flow)

    def _training(self, kind: str, num_microbatches: int, flow: Flow) -> ProvenProgram:
        key = (kind, num_microbatches, flow)
        if key not in self._proven:
            schedule = self._agreed(num_microbatches)
            self._proven[key] = prove(self._lowered(schedule, flow, reduces=kind == "reducing"))
        return self._proven[key]

    def evaluation(self, num_microbatches: int, flow: Flow) -> ProvenProgram:
        """Return the program of forwards alone."""
        key = ("evaluation", num_microbatches, flow)
        if key not in self._proven:
            schedule = forward_only_on(self.placement, num_microbatches)
            self._proven[key] = prove(self._lowered(schedule, flow, reduces=False))
        return self._proven[key]

    def _lowered(self, schedule: Schedule, flow: Flow, *, reduces: bool) -> Program:
        return lower(schedule, flow, self.costs, reduce_grads=reduces, unshard=self._unshard)

    def _agreed(self, num_microbatches: int) -> Schedule:
        """The schedule that all ranks have made."""
        if num_microbatches not in self._schedules:
            try:
                made = self._made(num_microbatches)
                self._check_placement(made)
            except EvenflowError:
                self._world.gather_numbers([False, 0])  # the others wait for this rank's word
                raise
            self._check_alike(
                self._world.gather_numbers([True, fingerprint(made.placement, made.ranks)]), num_microbatches
            )
            self._schedules[num_microbatches] = made
        return self._schedules[num_microbatches]

    def _check_placement(self, made: Schedule) -> None:
        if made.placement != self.placement:
            raise ConfigError(
                f"{self._call(made.num_microbatches)} placed the stages on ranks {made.placement.rank_of}, "
                f"and before, for other microbatches, on {self.placement.rank_of}; a stage cannot move: "
                "place them alike"
            )

    def _check_alike(self, rows: Sequence[Sequence[int]], num_microbatches: int) -> None:
        for rank, row in enumerate(rows):
            if not row[0]:
                raise PeerError(f"rank {rank} has no schedule of {num_microbatches} microbatches")
            if row != rows[0]:
                raise ConfigError(
                    f"ranks 0 and {rank} have different schedules of {num_microbatches} microbatches: name "
                    "the same on every rank; a function must depend on its arguments alone"
                )

    def _call(self, num_microbatches: int) -> str:
        name = getattr(self._method, "__name__", type(self._method).__name__)
        return (
            f"schedule={name} with num_ranks={self._num_ranks}, stages_per_rank={self._stages_per_rank}, "
            f"num_microbatches={num_microbatches}"
        )

    def _made(self, num_microbatches: int) -> Schedule:
        """The function's schedule, checked."""
        call = self._call(num_microbatches)
        try:
            made: object = self._method(
                num_ranks=self._num_ranks,
                stages_per_rank=self._stages_per_rank,
                num_microbatches=num_microbatches,
            )
        except EvenflowError:
            raise
        except Exception as error:
            raise ConfigError(f"{call} raised {type(error).__name__}: {error}") from error
        if not isinstance(made, Schedule):
            raise ConfigError(
                f"{call} returned a {type(made).__name__}; it must return an evenflow.ir.Schedule"
            )
        if faults := list(self._faults(made, num_microbatches)):
            raise ConfigError(f"{call} " + "; ".join(faults))
        return made

    def _faults(self, made: Schedule, num_microbatches: int) -> Iterator[str]:
        num_stages = self._num_ranks * self._stages_per_rank
        found = made.placement
        if (found.num_ranks, found.num_stages) != (self._num_ranks, num_stages):
            yield (
                f"placed {found.num_stages} stages on {found.num_ranks} ranks; it must place {num_stages} on "
                f"{self._num_ranks}"
            )
        if made.num_microbatches != num_microbatches:
            yield f"returned a schedule of {made.num_microbatches} microbatches"
        if not made.trains:
            yield "runs no backward: it evaluates and cannot train; use '1f1b'"


def fingerprint(*things: object) -> int:
    """Return a 56-bit number of what the things' `repr` says, the same in every process.

    >>> fingerprint("1f1b", 4) == fingerprint("1f1b", 4), fingerprint("1f1b", 4) == fingerprint("1f1b", 3)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(things).encode(), digest_size=7).digest(), "little")
