"""Linear: one stage for each of some ranks, exact.

A dynamic programme over *states*, which say how many devices of each kind have had their stage (so that the
best order of mixed devices comes out by itself), and over the spot where the last stage ended. It runs three
times, because the second-most loaded rank and the bytes don't split into parts that are best by themselves:

1. the smallest bottleneck T1;
2. the smallest T2 so that all ranks but one stay within T2, and that one within T1: a flag in the state tells
   whether the exception is used up;
3. the fewest bytes under T1 and T2, with the same flag.

Only runs that take no more than a guess are looked at: one guess for the most loaded rank, and a lower one
for all others, which matters where one node outweighs a whole stage. The guesses start at lower bounds and
grow until nothing better can lie outside. What is left is a narrow band, cut out of numpy arrays.

Source of the band: Pinar & Aykanat, "Fast optimal load balancing algorithms for 1D partitioning", 2004.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from evenflow.ir.costs import ROUNDING
from evenflow.plan.cuts.runs import Floats, Ints, Others, RunMemory, Runs

Flags: TypeAlias = npt.NDArray[np.bool_]
NOTHING = -1.0  # seconds within which no stage is: none may be excepted
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


@dataclass(frozen=True, slots=True)
class Aim:
    """What a programme minimises, where one rank takes up to `excepted` and all others up to `within`.

    `counts`: "most" the largest load, "others" the largest but for the excepted one, "bytes" all cuts'.
    """

    within: float
    excepted: float
    counts: Literal["most", "others", "bytes"]

    def ordinary(self, before: Floats, loads: Floats, num_bytes: Floats) -> Floats:
        """Return the values with one more stage each, of the given loads, that ends in cuts of such bytes."""
        after = before + num_bytes if self.counts == "bytes" else np.maximum(before, loads)
        return np.where(loads <= self.within, after, math.inf)

    def exception(self, before: Floats, loads: Floats, num_bytes: Floats) -> Floats:
        """Return the same where that stage is the excepted one."""
        within = loads <= self.excepted
        match self.counts:
            case "most":
                return np.where(within, np.maximum(before, loads), math.inf)
            case "others":
                return np.where(within, before, math.inf)
            case "bytes":
                return np.where(within, before + num_bytes, math.inf)
        assert_never(self.counts)


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
    """The runs worth looking at.

    - `within[arc]`, `excepted[arc]`: the earliest first spot for each last spot, of ranks that are not
      excepted and of one that is.
    - `live[state, flag]`: the spots through which some path leads; flag 1 where a rank was excepted before.
    """

    within: list[Ints]
    excepted: list[Ints]
    live: Flags


def _pairs(earliest: Ints, starting: Flags, ending: Flags) -> tuple[Ints, Ints]:
    """Return first and last spots of all runs, by last spots."""
    starts, ends = np.flatnonzero(starting), np.flatnonzero(ending)
    if not len(starts):
        return starts, starts
    first = np.maximum(earliest[ends], starts[0])
    counts = np.maximum(np.minimum(ends, starts[-1] + 1) - first, 0)
    shift = first - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(shift, counts), np.repeat(ends, counts)


def _forward(reached: Flags, earliest: Ints) -> Flags:
    """Return the spots where a run from one of these may end."""
    spots = np.arange(len(reached))
    sums = np.concatenate([[0], np.cumsum(reached)])
    return np.asarray(sums[spots] > sums[np.minimum(earliest, spots)])


def _backward(live: Flags, earliest: Ints) -> Flags:
    """Return the spots where a run to one of these may start."""
    spots = np.arange(len(live))
    sums = np.concatenate([[0], np.cumsum(live)])
    latest = np.searchsorted(earliest, spots, side="right")  # one past the last spot that one reaches
    return np.asarray(sums[latest] > sums[np.minimum(spots + 1, latest)])


@dataclass(frozen=True, slots=True)
class Line:
    """Stages in a row, from spot `first` to spot `last`, and the memory of their runs (None: no caps)."""

    runs: Runs
    memory: RunMemory | None
    arcs: Sequence[Arc]
    first: int
    last: int
    # What `_earliest_in_memory` found, by what it depends on: each guess at the bottleneck asks again.
    _fitting: dict[tuple[int, float, Others, float], Ints] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def cheapest(self, guesses: Iterable[tuple[float, float]]) -> list[Taken] | None:
        """Return the best stages, or None if memory allows none.

        Each guess is of the second-most loaded rank and of the most loaded one; the last must suffice.
        """
        if self._band(math.inf, NOTHING) is None:
            return None
        for within, excepted in guesses:
            most = self._least(Aim(within, excepted, "most"))
            if most < math.inf and (most <= within or not self._has_within(most * (1 - ROUNDING))):
                break
        else:
            raise AssertionError("some partition fits, and none was found")
        most *= 1 + ROUNDING
        second = self._least(Aim(min(within, most), most, "others")) * (1 + ROUNDING)
        return self._trace(Aim(second, most, "bytes"), self._load)

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
        aim = Aim(math.inf, NOTHING, "most")
        return None if self._band(math.inf, NOTHING, scale) is None else self._trace(aim, self._ratio, scale)

    def _least(self, aim: Aim) -> float:
        band = self._band(aim.within, aim.excepted)
        return math.inf if band is None else float(self._sweep(band, aim, self._load)[-1][:, self.last].min())

    def _has_within(self, most_seconds: float) -> bool:
        """Whether some stages all take no more than that."""
        reached = np.zeros((self.arcs[-1].after + 1, len(self.runs.spots)), dtype=bool)
        reached[0, self.first] = True
        for arc in self.arcs:
            elapsed, price = self.runs.elapsed[arc.kind], self.runs.price
            latest = np.where(reached[arc.before], elapsed - price, -math.inf)
            latest = _largest_before(latest, self._earliest_in_memory(arc, 1.0))
            reached[arc.after] |= elapsed + price + arc.others.seconds - latest <= most_seconds
        return bool(reached[-1, self.last])

    def _load(self, arc: Arc, first: Ints, last: Ints) -> Floats:
        return arc.others.seconds + self.runs.seconds(arc.kind, first, last)

    def _ratio(self, arc: Arc, first: Ints, last: Ints) -> Floats:
        assert self.memory is not None
        in_flight = self.runs.problem.in_flight[arc.stage]
        need = self.memory.need(first, last - first, in_flight, arc.others)
        return np.asarray(need / self.runs.kinds[arc.kind].cap_bytes)

    def _band(self, within: float, excepted: float, scale: float = 1.0) -> Band | None:
        """Return the runs within so many seconds and so many times the cap; None if no path is left."""
        known: dict[tuple[int, float, Others], tuple[Ints, Ints]] = {}
        for arc in self.arcs:
            key = self._key(arc)
            if key not in known:
                fitting, elapsed = self._earliest_in_memory(arc, scale), self.runs.elapsed[arc.kind]
                ordinary = _earliest_in_time(elapsed, within - arc.others.seconds)
                exception = _earliest_in_time(elapsed, excepted - arc.others.seconds)
                known[key] = np.maximum(fitting, ordinary), np.maximum(fitting, exception)
        earliest = [known[self._key(arc)] for arc in self.arcs]
        reached = np.zeros((self.arcs[-1].after + 1, 2, len(self.runs.spots)), dtype=bool)
        reached[0, 0, self.first] = True
        for arc, (ordinary, exception) in zip(self.arcs, earliest, strict=True):
            before, after = reached[arc.before], reached[arc.after]
            after[0] |= _forward(before[0], ordinary)
            after[1] |= _forward(before[1], ordinary) | _forward(before[0], exception)
        live = np.zeros_like(reached)
        live[-1, :, self.last] = reached[-1, :, self.last]
        for arc, (ordinary, exception) in zip(reversed(self.arcs), reversed(earliest), strict=True):
            before, after = live[arc.before], live[arc.after]
            before[0] |= _backward(after[0], ordinary) | _backward(after[1], exception)
            before[1] |= _backward(after[1], ordinary)
            before &= reached[arc.before]
        if not live[0, 0, self.first]:
            return None
        return Band([pair[0] for pair in earliest], [pair[1] for pair in earliest], live)

    def _key(self, arc: Arc) -> tuple[int, float, Others]:
        return arc.kind, self.runs.problem.in_flight[arc.stage], arc.others

    def _earliest_in_memory(self, arc: Arc, scale: float) -> Ints:
        """For each last spot, the earliest first spot whose run the arc's rank can hold."""
        key = *self._key(arc), scale
        if key not in self._fitting:
            self._fitting[key] = self._searched_in_memory(arc, scale)
        return self._fitting[key]

    def _searched_in_memory(self, arc: Arc, scale: float) -> Ints:
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
        values = np.full(band.live.shape, math.inf)
        values[0, 0, self.first] = 0.0
        for number, arc in enumerate(self.arcs):
            live_before, live_after = band.live[arc.before], band.live[arc.after]
            before, after = values[arc.before], values[arc.after]
            first, last = _pairs(band.within[number], live_before.any(axis=0), live_after.any(axis=0))
            if len(first):
                loads, num_bytes = weigh(arc, first, last), self.runs.num_bytes[last]
                _keep_least(after, aim.ordinary(before[:, first], loads, num_bytes), last)
            first, last = _pairs(band.excepted[number], live_before[0], live_after[1])
            if len(first):
                loads, num_bytes = weigh(arc, first, last), self.runs.num_bytes[last]
                _keep_least(after[1:], aim.exception(before[:1, first], loads, num_bytes), last)
        return values

    def _trace(self, aim: Aim, weigh: "Weigh", scale: float = 1.0) -> list[Taken]:
        """Return the stages of the best path, from the first."""
        band = self._band(aim.within, aim.excepted, scale)
        assert band is not None, "some path is within the limits"
        values = self._sweep(band, aim, weigh)
        state, spot = len(values) - 1, self.last
        flag = int(values[state, :, spot].argmin())
        path: list[Taken] = []
        while state:
            best = values[state, flag, spot]
            for arc, first, before, reaches in self._ways(band, aim, weigh, values, Place(state, flag, spot)):
                hits = np.flatnonzero(reaches == best)
                if len(hits):
                    path.append(Taken(arc, int(first[hits[0]]), spot))
                    state, flag, spot = arc.before, before, path[-1].first
                    break
            else:
                raise AssertionError("a value without a step that leads to it")
        return path[::-1]

    def _ways(
        self, band: Band, aim: Aim, weigh: "Weigh", values: Floats, at: "Place"
    ) -> Iterator[tuple[Arc, Ints, int, Floats]]:
        """Yield the steps that lead to a place: arc, first spots, flag before, and the values they make."""
        for number, arc in enumerate(self.arcs):
            if arc.after != at.state:
                continue
            ways = [(band.within[number], at.flag, aim.ordinary)]
            if at.flag:
                ways.append((band.excepted[number], 0, aim.exception))
            for earliest, before, extend in ways:
                first = np.arange(earliest[at.spot], at.spot)
                last = np.full_like(first, at.spot)
                came = values[arc.before, before, first]
                yield arc, first, before, extend(came, weigh(arc, first, last), self.runs.num_bytes[last])


class Place(NamedTuple):
    """Where a path is: its state, whether a rank was excepted, and the spot where the last stage ended."""

    state: int
    flag: int
    spot: int


Weigh = Callable[[Arc, Ints, Ints], Floats]


def _keep_least(after: Floats, extended: Floats, last: Ints) -> None:
    """Lower `after[:, spot]` to the least of the values that end there; `last` ascends."""
    begins = np.flatnonzero(np.diff(last, prepend=-1))
    ends = last[begins]
    after[:, ends] = np.minimum(after[:, ends], np.minimum.reduceat(extended, begins, axis=1))


def _largest_before(values: Floats, earliest: Ints) -> Floats:
    """Return for each spot the largest of the values from its earliest spot to the one before it."""
    spots = np.arange(len(values))
    widths = np.maximum(spots - earliest, 0)
    largest = np.full(len(values), -math.inf)
    best = values.copy()  # of so many spots from each on, as `size` says
    for power in range(int(widths.max(initial=0)).bit_length()):
        size = 1 << power
        here = (widths >> power) == 1  # two windows of that size cover it
        largest[here] = np.maximum(best[earliest[here]], best[spots[here] - size])
        best[: len(best) - size] = np.maximum(best[: len(best) - size], best[size:])
    return largest


def guesses_from(bound: float) -> Iterator[float]:
    """Guesses at a bottleneck, or a ratio of need to cap, above its bound; the last of them is infinite.

    >>> [round(guess, 2) for guess in guesses_from(2.0)][:3]
    [2.02, 2.06, 2.2]
    """
    yield from (bound * (1 + part) for part in GUESSES)
    yield math.inf


def _earliest_in_time(elapsed: Floats, most: float) -> Ints:
    """For every last spot, the earliest first spot whose nodes take no more than that."""
    slack = 4 * np.finfo(float).eps * elapsed[-1]  # what sums up to here may be off
    return np.asarray(np.searchsorted(elapsed, elapsed - most * (1 + ROUNDING) - slack, side="left"))
