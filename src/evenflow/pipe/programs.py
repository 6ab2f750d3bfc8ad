"""Programs: a schedule function asked for as many microbatches as a step has, lowered and proven.

A stage stays where it is: whatever the number of microbatches, the function must give the same placement, and
evaluation runs on it too.
"""

from collections.abc import Iterator

from evenflow.errors import ConfigError, EvenflowError
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.lower import lower
from evenflow.schedules.catalog import ScheduleFunction
from evenflow.schedules.forward_only import forward_only_on
from evenflow.validate import ProvenProgram, prove


class Programs:
    """The proven programs of one pipeline, made when they are first asked for.

    `example` is the schedule of the first batch, which decides where the stages live. Raises `ConfigError`
    for a function that fails or returns no schedule of these sizes.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> programs = Programs(gpipe, num_ranks=2, stages_per_rank=1, num_microbatches=4)
    >>> programs.placement.rank_of
    (0, 1)
    >>> len(programs.evaluation(4, Flow.chain(2)).order)
    16
    """

    def __init__(
        self, method: ScheduleFunction, *, num_ranks: int, stages_per_rank: int, num_microbatches: int
    ) -> None:
        self._method, self._num_ranks, self._stages_per_rank = method, num_ranks, stages_per_rank
        self._proven: dict[tuple[bool, int, Flow], ProvenProgram] = {}
        self._placement: Placement | None = None
        self.example = self._schedule(num_microbatches)
        self._placement = self.example.placement

    @property
    def placement(self) -> Placement:
        """Where each stage lives."""
        return self.example.placement

    def training(self, num_microbatches: int, flow: Flow) -> ProvenProgram:
        """Return the program of a step. Raises `ScheduleError` listing all faults of a wrong schedule."""
        key = (True, num_microbatches, flow)
        if key not in self._proven:
            self._proven[key] = prove(lower(self._schedule(num_microbatches), flow))
        return self._proven[key]

    def evaluation(self, num_microbatches: int, flow: Flow) -> ProvenProgram:
        """Return the program of forwards alone."""
        key = (False, num_microbatches, flow)
        if key not in self._proven:
            self._proven[key] = prove(lower(forward_only_on(self.placement, num_microbatches), flow))
        return self._proven[key]

    def _schedule(self, num_microbatches: int) -> Schedule:
        """The function's schedule, checked."""
        name = getattr(self._method, "__name__", type(self._method).__name__)
        call = (
            f"schedule={name} with num_ranks={self._num_ranks}, stages_per_rank={self._stages_per_rank}, "
            f"num_microbatches={num_microbatches}"
        )
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
        elif self._placement not in (None, found):
            yield (
                f"placed the stages on ranks {found.rank_of}, and before, for other microbatches, on "
                f"{self.placement.rank_of}; a stage cannot move: place them alike"
            )
        if made.num_microbatches != num_microbatches:
            yield f"returned a schedule of {made.num_microbatches} microbatches"
        if not made.trains:
            yield "runs no backward: it evaluates and cannot train; use '1f1b'"
