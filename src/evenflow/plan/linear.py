"""Linear: one stage for each of some ranks, exact.

A dynamic programme over *states*, which say how many devices of each kind have had their stage (so that the
best order of mixed devices comes out by itself), and over the spot where the last stage ended. It runs three
times, because the second-most loaded rank and the bytes don't split into parts that are best by themselves:

1. the smallest bottleneck T1;
2. the smallest T2 so that all ranks but one stay within T2, and that one within T1: a flag in the state tells
   whether the exception is used up;
3. the fewest bytes under T1 and T2, with the same flag.

Only runs that take no more than a guess at T1 are looked at; the guess starts at the lower bound and grows
until it holds. What is left is a narrow band, cut out of numpy arrays.

Source of the band: Pinar & Aykanat, "Fast optimal load balancing algorithms for 1D partitioning", 2004.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from evenflow.ir.costs import ROUNDING
from evenflow.plan.runs import Floats, Ints, Others, RunMemory, Runs

GUESSES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)


class Arc(NamedTuple):
    """One step of the programme: the device of this kind takes stage `stage`, from state to state."""

    before: int
    after: int
    kind: int
    stage: int
    others: Others = Others()


class Taken(NamedTuple):
    """A step as the best path takes it: which arc, and the run's first and last spot."""

    arc: Arc
    first: int
    last: int


class Aim(Protocol):
    """What a programme minimises. Row 0 of the values: no rank is excepted; row 1: one is."""

    def extend(self, before: Floats, loads: Floats, num_bytes: Floats) -> Floats:
        """Return the values with one more stage each, of the given loads, that ends in cuts of such bytes."""


@dataclass(frozen=True, slots=True)
class LeastLoad:
    """The most loaded rank, where one is excepted if it stays within `excepted`."""

    excepted: float = -1.0

    def extend(self, before: Floats, loads: Floats, num_bytes: Floats) -> Floats:
        plain = np.maximum(before, loads)
        plain[1] = np.minimum(plain[1], np.where(loads <= self.excepted, before[0], math.inf))
        return plain


@dataclass(frozen=True, slots=True)
class FewestBytes:
    """The bytes of all cuts, where one rank stays within `most` and all others within `second`."""

    most: float
    second: float

    def extend(self, before: Floats, loads: Floats, num_bytes: Floats) -> Floats:
        plain = np.where(loads <= self.second, before, math.inf)
        plain[1] = np.minimum(plain[1], np.where(loads <= self.most, before[0], math.inf))
        return np.asarray(plain + num_bytes)


def arcs_of(kind_of: Sequence[int], *, any_order: bool) -> list[Arc]:
    """Return the programme's steps for one stage a device: in this order of kinds, or in all orders.

    >>> len(arcs_of([0, 0, 1], any_order=False)), len(arcs_of([0, 0, 1], any_order=True))
    (3, 7)
    """
    if not any_order:
        return [Arc(rank, rank + 1, kind, rank) for rank, kind in enumerate(kind_of)]
    counts = Counter(kind_of)
    kinds = sorted(counts)
    used = list(itertools.product(*(range(counts[kind] + 1) for kind in kinds)))
    number = {state: index for index, state in enumerate(used)}
    return [
        Arc(index, number[(*state[:place], state[place] + 1, *state[place + 1 :])], kind, sum(state))
        for index, state in enumerate(used)
        for place, kind in enumerate(kinds)
        if state[place] < counts[kind]
    ]


@dataclass(frozen=True, slots=True)
class Band:
    """The runs worth looking at: the earliest first spot of each arc and last spot; live spots of states."""

    earliest: list[Ints]
    live: npt.NDArray[np.bool_]

    def pairs(self, number: int, arc: Arc) -> tuple[Ints, Ints]:
        """Return first and last spots of all runs of an arc, by last spots."""
        starts, ends = np.flatnonzero(self.live[arc.before]), np.flatnonzero(self.live[arc.after])
        if not len(starts):
            return starts, starts
        first = np.maximum(self.earliest[number][ends], starts[0])
        counts = np.maximum(np.minimum(ends, starts[-1] + 1) - first, 0)
        shift = first - (np.cumsum(counts) - counts)
        return np.arange(counts.sum()) + np.repeat(shift, counts), np.repeat(ends, counts)


@dataclass(frozen=True, slots=True)
class Line:
    """Stages in a row, from spot `first` to spot `last`, and the memory of their runs (None: no caps)."""

    runs: Runs
    memory: RunMemory | None
    arcs: Sequence[Arc]
    first: int
    last: int

    def cheapest(self, guesses: Iterable[float]) -> list[Taken] | None:
        """Return the best stages, or None if memory allows none. The last guess must be infinite."""
        if self._band(math.inf, 1.0) is None:
            return None
        most = math.inf
        for guess in guesses:
            if (band := self._band(guess, 1.0)) is not None:
                most = self._least(band, LeastLoad())
                if most > guess:  # prices make it worse than it seemed: look at all runs up to there
                    most = self._least(self._sure_band(most), LeastLoad())
                break
        most *= 1 + ROUNDING
        band = self._sure_band(most)
        second = self._least(band, LeastLoad(most)) * (1 + ROUNDING)
        return self._trace(band, FewestBytes(most, second), self._load)

    def roomiest(self, scales: Iterable[float]) -> list[Taken]:
        """Return the stages whose largest ratio of need to cap is smallest. The last scale must do."""
        assert self.memory is not None, "without caps everything fits"
        most = max(kind.cap_bytes for kind in self.runs.kinds)
        for scale in scales:
            known = self.memory if self.memory.limit_bytes >= most * scale else self.runs.memory(most * scale)
            if (taken := replace(self, memory=known).roomiest_within(scale)) is not None:
                return taken
        raise AssertionError("nothing fits into the largest of these scales")

    def roomiest_within(self, scale: float) -> list[Taken] | None:
        """Return the same if its ratio is within `scale`, for which `memory` must suffice; otherwise None."""
        band = self._band(math.inf, scale)
        return None if band is None else self._trace(band, LeastLoad(), self._ratio)

    def _least(self, band: Band, aim: LeastLoad) -> float:
        return float(self._sweep(band, aim, self._load)[-1][:, self.last].min())

    def _sure_band(self, most_seconds: float) -> Band:
        band = self._band(most_seconds, 1.0)
        assert band is not None, "some stages take no more than that"
        return band

    def _load(self, arc: Arc, first: Ints, last: Ints) -> Floats:
        return arc.others.seconds + self.runs.seconds(arc.kind, first, last)

    def _ratio(self, arc: Arc, first: Ints, last: Ints) -> Floats:
        assert self.memory is not None
        in_flight = self.runs.problem.in_flight[arc.stage]
        need = self.memory.need(first, last - first, in_flight, arc.others)
        return np.asarray(need / self.runs.kinds[arc.kind].cap_bytes)

    def _band(self, most_seconds: float, scale: float) -> Band | None:
        """Return the runs within so many seconds and so many times the cap; None if no path is left."""
        known: dict[tuple[int, float, Others], Ints] = {}
        earliest = []
        for arc in self.arcs:
            key = arc.kind, self.runs.problem.in_flight[arc.stage], arc.others
            if key not in known:
                known[key] = np.maximum(
                    _earliest_in_time(self.runs.elapsed[arc.kind], most_seconds - arc.others.seconds),
                    self._earliest_in_memory(arc, scale),
                )
            earliest.append(known[key])
        num_states, num_spots = self.arcs[-1].after + 1, len(self.runs.spots)
        spots = np.arange(num_spots)
        reached = np.zeros((num_states, num_spots), dtype=bool)
        reached[0, self.first] = True
        for arc, start in zip(self.arcs, earliest, strict=True):
            sums = np.concatenate([[0], np.cumsum(reached[arc.before])])
            reached[arc.after] |= sums[spots] > sums[np.minimum(start, spots)]
        live = np.zeros_like(reached)
        live[-1, self.last] = reached[-1, self.last]
        for arc, start in zip(reversed(self.arcs), reversed(earliest), strict=True):
            sums = np.concatenate([[0], np.cumsum(live[arc.after])])
            latest = np.searchsorted(start, spots, side="right")  # one past the last spot that one reaches
            live[arc.before] |= reached[arc.before] & (sums[latest] > sums[np.minimum(spots + 1, latest)])
        return Band(earliest, live) if live[0, self.first] else None

    def _earliest_in_memory(self, arc: Arc, scale: float) -> Ints:
        num_spots = len(self.runs.spots)
        if self.memory is None:
            return np.zeros(num_spots, dtype=np.int64)
        cap = self.runs.kinds[arc.kind].cap_bytes * scale * (1 + ROUNDING)
        in_flight = self.runs.problem.in_flight[arc.stage]
        firsts = np.arange(num_spots - 1)
        low, high = np.zeros_like(firsts), np.full_like(firsts, len(self.memory.static))
        while (low < high).any():  # a longer run needs more
            middle = np.minimum((low + high + 1) // 2, high)
            tried = np.maximum(middle, 1)
            fits = (self.memory.need(firsts, tried, in_flight, arc.others) <= cap) | (middle == 0)
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return np.searchsorted(firsts + low, np.arange(num_spots), side="left")

    def _sweep(self, band: Band, aim: Aim, weigh: "Weigh") -> Floats:
        """Return the best values: `[state, flag, spot where the last stage ended]`."""
        values = np.full((len(band.live), 2, len(self.runs.spots)), math.inf)
        values[0, 0, self.first] = 0.0
        for number, arc in enumerate(self.arcs):
            first, last = band.pairs(number, arc)
            if not len(first):
                continue
            extended = aim.extend(
                values[arc.before][:, first], weigh(arc, first, last), self.runs.num_bytes[last]
            )
            begins = np.flatnonzero(np.diff(last, prepend=-1))
            best, ends = np.minimum.reduceat(extended, begins, axis=1), last[begins]
            values[arc.after][:, ends] = np.minimum(values[arc.after][:, ends], best)
        return values

    def _trace(self, band: Band, aim: Aim, weigh: "Weigh") -> list[Taken]:
        """Return the stages of the best path, from the first."""
        values = self._sweep(band, aim, weigh)
        state, spot = len(values) - 1, self.last
        flag = int(values[state, :, spot].argmin())
        path: list[Taken] = []
        while state:
            state, spot, flag = self._came_from(band, aim, weigh, values, (state, spot, flag), path)
        return path[::-1]

    def _came_from(
        self,
        band: Band,
        aim: Aim,
        weigh: "Weigh",
        values: Floats,
        at: tuple[int, int, int],
        path: list[Taken],
    ) -> tuple[int, int, int]:
        """Find the step that led here, add it to the path and return where it came from."""
        state, spot, flag = at
        for number, arc in enumerate(self.arcs):
            if arc.after != state:
                continue
            first = np.arange(band.earliest[number][spot], spot)
            last = np.full_like(first, spot)
            loads, num_bytes = weigh(arc, first, last), self.runs.num_bytes[last]
            for before in range(flag + 1):
                alone = np.full((2, len(first)), math.inf)
                alone[before] = values[arc.before, before, first]
                hits = np.flatnonzero(aim.extend(alone, loads, num_bytes)[flag] == values[state, flag, spot])
                if len(hits):
                    path.append(Taken(arc, int(first[hits[0]]), spot))
                    return arc.before, int(first[hits[0]]), before
        raise AssertionError("a value without a step that leads to it")


Weigh = Callable[[Arc, Ints, Ints], Floats]


def guesses_from(bound: float) -> Iterator[float]:
    """Guesses at a bottleneck, or a ratio of need to cap, above its bound; the last of them is infinite.

    >>> [round(guess, 2) for guess in guesses_from(2.0)][:3]
    [2.02, 2.06, 2.2]
    """
    yield from (bound * (1 + part) for part in GUESSES)
    yield math.inf


def _earliest_in_time(elapsed: Floats, most: float) -> Ints:
    """For every last spot, the earliest first spot whose nodes take no more than that."""
    return np.searchsorted(elapsed, elapsed - most * (1 + ROUNDING), side="left")
