"""Looped: several stages on each rank, dealt out round after round; exact if few partitions are to be tried.

Otherwise a heuristic. What a rank does depends on cuts far apart, which a dynamic programme over the chain
can't know. But one stage of every rank, a *window* of as many stages in a row as there are ranks, can be
placed exactly by `linear.py` while all others stay. Window after window is placed anew until none gets
better. It starts with the best partition of all stages on devices of their own. If that does not fit into
memory, windows are first placed to lower the largest ratio of need to cap.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from evenflow.ir.costs import ROUNDING
from evenflow.plan.cuts.linear import Arc, Line, Taken, arcs_of, guesses_from
from evenflow.plan.cuts.runs import Floats, Ints, Others, RunMemory, Runs

MOST_ORDERS = 24  # of devices, of which all are tried; of more, only three
MOST_PARTITIONS = 20_000  # of an order of devices, of which all are tried

Score: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Loops:
    """For each order of devices (kinds of the ranks) that was tried, the cuts found (spots).

    Not all of them need fit into memory. `is_exact` if there is nothing better.
    """

    found: list[tuple[list[int], list[int]]]
    is_exact: bool


def loops(runs: Runs) -> Loops:
    """Return good looped partitions."""
    memory = None if runs.memory_if_scarce() is None else runs.memory(math.inf)
    orders, are_all = _orders(runs)
    searches = [_Loop(runs, memory, order) for order in orders]
    num_cuts = runs.problem.placement.num_stages - 1
    if math.comb(runs.num_steps - 1, num_cuts) <= MOST_PARTITIONS:
        cuts = np.array(list(itertools.combinations(range(1, runs.num_steps), num_cuts)), dtype=np.int64)
        return Loops([(search.best_of(cuts), search.order) for search in searches], are_all)
    return Loops([(search.settled(), search.order) for search in searches], is_exact=False)


def _orders(runs: Runs) -> tuple[list[list[int]], bool]:
    """All orders of kinds if they are few; else that given, its reverse, and the best of one stage each."""
    given = list(runs.kind_of)
    if not runs.problem.any_order or len(runs.kinds) == 1:
        return [given], True
    counts = [given.count(kind) for kind in range(len(runs.kinds))]
    if math.factorial(len(given)) // math.prod(map(math.factorial, counts)) <= MOST_ORDERS:
        return [list(order) for order in dict.fromkeys(itertools.permutations(given))], True
    line = Line(runs, None, arcs_of(given, any_order=True), 0, runs.num_steps)
    taken = line.cheapest((guess, guess) for guess in guesses_from(runs.bound_seconds()))
    assert taken is not None, "without caps everything fits"
    return [given, given[::-1], [step.arc.kind for step in taken]], False


@dataclass(frozen=True, slots=True)
class _Loop:
    """Looped stages with these kinds at the ranks. `cuts` of its methods are spots, both ends among them."""

    runs: Runs
    memory: RunMemory | None
    order: list[int]

    def settled(self) -> list[int]:
        """Return cuts that no window improves."""
        num_stages, num_ranks = self.runs.problem.placement.num_stages, len(self.order)
        arcs = [Arc(stage, stage + 1, self.order[stage % num_ranks], stage) for stage in range(num_stages)]
        alone = Line(self.runs, None, arcs, 0, self.runs.num_steps)
        guesses = guesses_from(self.runs.mean_seconds() * num_ranks / num_stages)
        taken = alone.cheapest((guess, guess) for guess in guesses)
        assert taken is not None, "without caps everything fits"
        cuts = [0, *(step.last for step in taken)]
        if self._ratio(cuts)[0] > 1 + ROUNDING:
            cuts = self._improved(cuts, self._ratio, self._roomiest)
        if self._ratio(cuts)[0] <= 1 + ROUNDING:
            cuts = self._improved(cuts, self._score, self._cheapest)
        return cuts[1:-1]

    def _improved(
        self,
        cuts: list[int],
        score: Callable[[Sequence[int]], Score],
        place: Callable[[Line, Sequence[int]], list[Taken]],
    ) -> list[int]:
        """Place one window after the other anew, until none lowers the score."""
        num_windows = len(cuts) - len(self.order)
        best, idle = score(cuts), 0
        for start in itertools.cycle(range(num_windows)):
            line = self._window(cuts, start)
            placed = [step.last for step in place(line, cuts)]
            tried = [*cuts[: start + 1], *placed, *cuts[start + len(placed) + 1 :]]
            now = score(tried)
            idle = 0 if _is_less(now, best) else idle + 1
            if idle == 0:
                cuts, best = tried, now
            if idle == num_windows:
                return cuts
        raise AssertionError("there is at least one window")

    def _cheapest(self, line: Line, cuts: Sequence[int]) -> list[Taken]:
        taken = line.cheapest([(self._score(cuts)[0] * (1 + ROUNDING),) * 2])
        assert taken is not None, "the stages fit as they are"
        return taken

    def _roomiest(self, line: Line, cuts: Sequence[int]) -> list[Taken]:
        return line.roomiest([self._ratio(cuts)[0]])

    def _window(self, cuts: Sequence[int], start: int) -> Line:
        """The programme that places anew the stages from `start` on, one of each rank."""
        num_ranks = len(self.order)
        stages = range(start, start + num_ranks)
        arcs = [
            Arc(place, place + 1, self.order[stage % num_ranks], stage, self._others(cuts, stage))
            for place, stage in enumerate(stages)
        ]
        return Line(self.runs, self.memory, arcs, cuts[start], cuts[start + num_ranks])

    def _others(self, cuts: Sequence[int], stage: int) -> Others:
        """What the stage's rank does and needs for its other stages."""
        stages = np.arange(len(cuts) - 1)
        same_rank = (stages % len(self.order) == stage % len(self.order)) & (stages != stage)
        seconds, num_bytes, transient = (part[same_rank] for part in self._stages(np.array(cuts)))
        return Others(float(seconds.sum()), float(num_bytes.sum()), float(transient.max(initial=0.0)))

    def _stages(self, bounds: Ints) -> tuple[Floats, Floats, Floats]:
        """Seconds, bytes without transients, and transients of stages between `bounds[..., stage]`."""
        first, last = bounds[..., :-1], bounds[..., 1:]
        kinds = np.resize(self.order, first.shape[-1])
        price, elapsed = self.runs.price, self.runs.elapsed
        seconds = elapsed[kinds, last] - elapsed[kinds, first] + price[last] + price[first]
        if self.memory is None:
            return seconds, np.zeros_like(seconds), np.zeros_like(seconds)
        at = (last - first - 1, first)
        num_bytes = self.memory.static[at] + np.array(self.runs.problem.in_flight) * self.memory.held[at]
        return seconds, num_bytes, self.memory.transient[at]

    def _ranks(self, bounds: Ints) -> tuple[Floats, Floats]:
        """Seconds and ratios of need to cap: `[..., rank]`."""
        seconds, num_bytes, transient = (
            part.reshape(*part.shape[:-1], -1, len(self.order)) for part in self._stages(bounds)
        )
        caps = np.array([self.runs.kinds[kind].cap_bytes for kind in self.order])
        return seconds.sum(axis=-2), (num_bytes.sum(axis=-2) + transient.max(axis=-2)) / caps

    def _score(self, cuts: Sequence[int]) -> Score:
        loads = sorted(self._ranks(np.array(cuts))[0].tolist(), reverse=True)
        return (*loads[:2], float(self.runs.num_bytes[list(cuts)].sum()))

    def _ratio(self, cuts: Sequence[int]) -> Score:
        return (float(self._ranks(np.array(cuts))[1].max()),)

    def best_of(self, cuts: Ints) -> list[int]:
        """Return the best row of cuts that fits, or of those that don't the one that comes nearest."""
        bounds = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, self.runs.num_steps)))
        loads, ratios = self._ranks(bounds)
        ratio = ratios.max(axis=1)
        if ratio.min() > 1 + ROUNDING:
            return [int(cut) for cut in cuts[ratio.argmin()]]
        loads.sort(axis=1)
        left = np.flatnonzero(ratio <= 1 + ROUNDING)
        for column in (*loads.T[:-3:-1], self.runs.num_bytes[cuts].sum(axis=1)):
            left = left[column[left] <= column[left].min() * (1 + ROUNDING)]
        return [int(cut) for cut in cuts[left[0]]]


def _is_less(now: Score, best: Score) -> bool:
    """Whether the first number that differs, by more than rounding, is less."""
    for a, b in zip(now, best, strict=True):
        if abs(a - b) > ROUNDING * max(a, b):
            return a < b
    return False
