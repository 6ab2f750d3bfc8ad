"""Stragglers: a rank that computes more slowly than it should, for long. All others wait for it in each step.

How slow a rank is says what its steps computed for, over what the plan says, or, where there is none, over
what its own first steps took. That ratio is compared with the other ranks', because what slows all alike
(other batches, a model that is harder than planned) makes no straggler.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evenflow.ir.costs import Costs
from evenflow.ir.op import ComputeOp
from evenflow.runtime.notes.log import Log

WINDOW_STEPS = 8  # that are judged together, by their medians
_NUM_WINDOWS = 3  # in a row, after which a rank is persistently slow
_NUM_FIRST = 3  # windows that say what a rank takes, where no plan does; one more goes before, to warm up
SLOW_RATIO = 1.3  # to the other ranks' median
_QUICK_RATIO = 1.15  # below which a straggler is none any more
_CHANGE = 1.25  # by which a straggler must become slower to be told of again


@dataclass(frozen=True, slots=True)
class Pace:
    """The median seconds that a rank computed in each of its last steps, and those planned (0: no plan)."""

    seconds: float
    planned_seconds: float


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that has been slow since a step: its own ratio, and the other ranks' median one.

    With `ended` it no longer is.
    """

    rank: int
    since_step: int
    pace: Pace
    is_planned: bool
    ratio: float
    others_ratio: float
    ended: bool = False

    def told(self, host: str) -> str:
        """In a sentence.

        >>> print(Straggler(2, 40, Pace(0.12, 0.06), True, 2.0, 1.0, ended=True).told("a"))
        rank 2 (a) is no straggler any more: it computes for 0.12 s a step, 2.00 times the 0.06 s planned
        """
        if self.ended:
            return f"rank {self.rank} ({host}) is no straggler any more: it computes for {self._computes}"
        return (
            f"rank {self.rank} ({host}) is a straggler: it computes for {self._computes}, the other ranks "
            f"for {self.others_ratio:.2f} times theirs; since step {self.since_step}"
        )

    @property
    def _computes(self) -> str:
        said = "planned" if self.is_planned else "that it took at first"
        times = f"{self.ratio:.2f} times the {self.pace.planned_seconds:.3g} s {said}"
        return f"{self.pace.seconds:.3g} s a step, {times}"


def pace_of(steps: Sequence[Sequence[Log]], costs: Costs | None) -> Pace:
    """What a rank computed for in some steps, each the logs of its ranks."""
    taken = [sum(end - start for log in logs for start, end in log.computed) for logs in steps]
    planned = 0.0
    if costs is not None:
        ops = [line.op for log in steps[-1] for line in log.lines]
        planned = sum(costs.seconds(op) for op in ops if isinstance(op, ComputeOp))
    return Pace(statistics.median(taken), planned)


class Stragglers:
    """Judges windows of steps, one after the other."""

    def __init__(self) -> None:
        self._first: list[Mapping[int, Pace]] = []
        self._slow_since: dict[int, list[int]] = {}  # the windows in a row in which a rank was slow, by steps
        self._told: dict[int, float] = {}  # the ratio to others of those that were told of

    def judge(self, step: int, paces: Mapping[int, Pace]) -> list[Straggler]:
        """What is new after a window that ended with a step, in which each rank worked so.

        >>> judge = Stragglers().judge
        >>> slow = {0: Pace(1.0, 1.0), 1: Pace(1.1, 1.0), 2: Pace(3.0, 1.5)}
        >>> [straggler.rank for step in (8, 16, 24, 32) for straggler in judge(step, slow)]
        [2]
        """
        is_planned = all(pace.planned_seconds > 0 for pace in paces.values())
        planned = {rank: pace.planned_seconds for rank, pace in paces.items()}
        expected = planned if is_planned else self._expected(paces)
        if expected is None or len(paces) < 2 or not all(expected.values()):
            return []
        ratios = {rank: pace.seconds / expected[rank] for rank, pace in paces.items()}
        found = []
        for rank, ratio in ratios.items():
            others = statistics.median(each for other, each in ratios.items() if other != rank)
            if others <= 0:
                continue
            ended = self._noted(rank, step, ratio / others)
            if ended is not None:
                pace = Pace(paces[rank].seconds, expected[rank])
                since = self._slow_since[rank][0] if not ended else step
                found.append(Straggler(rank, since, pace, is_planned, ratio, others, ended))
        return found

    def _expected(self, paces: Mapping[int, Pace]) -> dict[int, float] | None:
        """What each rank took at first; None while that is still being found out."""
        if len(self._first) <= _NUM_FIRST:
            self._first.append(paces)
            return None
        return {
            rank: statistics.median(first[rank].seconds for first in self._first[1:] if rank in first)
            for rank in paces
        }

    def _noted(self, rank: int, step: int, relative: float) -> bool | None:
        """Whether a rank is a straggler no more (True), or is one as was not told yet; None: nothing new."""
        if relative <= SLOW_RATIO:
            self._slow_since.pop(rank, None)
            return True if relative < _QUICK_RATIO and self._told.pop(rank, None) is not None else None
        windows = self._slow_since.setdefault(rank, [])
        windows.append(step)
        if len(windows) < _NUM_WINDOWS or relative < self._told.get(rank, 0.0) * _CHANGE:
            return None
        self._told[rank] = relative
        return False
