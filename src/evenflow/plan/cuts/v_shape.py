"""V: each rank has one stage on the way down and one on the way back up, exact.

The dynamic programme of `linear.py`, from both ends of the chain at once: with each step a rank takes a run
next to what the ranks before it have taken at the front, and one at the back. So a state also has the spots
between which everything is still to be taken. Only pairs of spots are looked at whose inside the ranks that
remain can take, and whose outside the others can have taken; where the guess at the bottleneck is good these
are few. The last rank takes what is left, cut in two at any spot, for nothing: both parts are its own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evenflow.ir.costs import ROUNDING
from evenflow.plan.cuts.linear import NOTHING, Arc
from evenflow.plan.cuts.runs import Floats, Ints, RunMemory, Runs
from evenflow.search.compiled import compiled, inlined


class Tables(NamedTuple):
    """The arrays of one kind of device for the compiled functions; see `Runs` and `RunMemory`."""

    elapsed: Floats
    price: Floats
    num_bytes: Floats
    static: Floats
    held: Floats
    transient: Floats


class Step(NamedTuple):
    """One rank's step: its microbatches in flight down and up, its caps, whether it is the last.

    `cap_bytes` times `scale` is what it may need. If `weighs_memory`, loads are not seconds but ratios of
    need to cap.
    """

    in_flight_down: float
    in_flight_up: float
    cap_bytes: float
    scale: float
    most_seconds: float
    is_last: bool
    has_caps: bool
    weighs_memory: bool


class Aim(NamedTuple):
    """As `linear.py` has it: bytes, or the largest load but for a rank excepted that takes up to `most`."""

    counts_bytes: bool
    most: float
    second: float


class Pull(NamedTuple):
    """The best way to a pair of spots, without and with a rank excepted: value, and where it came from."""

    plain: float
    plain_down: int
    plain_up: int
    excepting: float
    excepting_down: int
    excepting_up: int
    excepting_flag: int


@inlined
def _need(tables: Tables, step: Step, a: int, b: int, c: int, d: int) -> float:
    """Bytes of a rank with the runs from spot a to b and from c to d."""
    down, up = b - a - 1, d - c - 1
    return float(
        tables.static[down, a]
        + step.in_flight_down * tables.held[down, a]
        + tables.static[up, c]
        + step.in_flight_up * tables.held[up, c]
        + max(tables.transient[down, a], tables.transient[up, c])
    )


@compiled
def _pull(values: Floats, low: Ints, tables: Tables, step: Step, aim: Aim, down: int, up: int) -> Pull:
    """Return the best way to have taken all before spot `down` and all from spot `up` on.

    `values[flag, i, j - low[i]]` is the best with all before i and from j on taken by the ranks before.
    """
    elapsed, price, rows = tables.elapsed, tables.price, len(tables.static)
    inner = 0.0 if step.is_last else price[down] + price[up]
    sent = 0.0 if step.is_last else tables.num_bytes[down] + tables.num_bytes[up]
    plain = excepting = math.inf
    plain_down = plain_up = excepting_down = excepting_up = excepting_flag = 0
    for i in range(down - 1, -1, -1):
        taken = elapsed[down] - elapsed[i]
        if taken > step.most_seconds or (step.has_caps and down - i > rows):
            break
        for j in range(max(up + 1, low[i]), min(low[i] + values.shape[2], len(elapsed))):
            if taken + elapsed[j] - elapsed[up] > step.most_seconds:
                break
            load = taken + elapsed[j] - elapsed[up] + price[i] + price[j] + inner
            if step.has_caps:
                if j - up > rows:
                    break
                need = _need(tables, step, i, down, up, j)
                if need > step.cap_bytes * step.scale:
                    break
                if step.weighs_memory:
                    load = need / step.cap_bytes
            without, once = values[0, i, j - low[i]], values[1, i, j - low[i]]
            if aim.counts_bytes:
                within = load <= aim.second
                ways = without + sent if within else math.inf, once + sent if within else math.inf
                except_now = without + sent if load <= aim.most else math.inf
            else:
                ways = max(without, load), max(once, load)
                except_now = without if load <= aim.most else math.inf
            if ways[0] < plain:
                plain, plain_down, plain_up = ways[0], i, j
            if ways[1] < excepting:
                excepting, excepting_down, excepting_up, excepting_flag = ways[1], i, j, 1
            if except_now < excepting:
                excepting, excepting_down, excepting_up, excepting_flag = except_now, i, j, 0
    return Pull(plain, plain_down, plain_up, excepting, excepting_down, excepting_up, excepting_flag)


@compiled
def _fill(
    before: Floats,
    after: Floats,
    low: Ints,
    low_after: Ints,
    high: Ints,
    tables: Tables,
    step: Step,
    aim: Aim,
) -> None:
    """Take the step to every pair of spots between `low_after` and `high`."""
    for down in range(1, len(high)):
        first, last = low_after[down], high[down]
        if step.is_last:
            first, last = max(first, down), min(last, down)
        for up in range(max(first, down), last + 1):
            best = _pull(before, low, tables, step, aim, down, up)
            at = up - low_after[down]
            after[0, down, at] = min(after[0, down, at], best.plain)
            after[1, down, at] = min(after[1, down, at], best.excepting)


class Half(NamedTuple):
    """A step as the best path takes it: which arc, and the spots where its two runs meet what is left."""

    arc: Arc
    down: int
    up: int


@dataclass(frozen=True, slots=True)
class Bent:
    """A V over a whole chain: `arcs` as for a linear placement of the ranks, `stage` being the rank."""

    runs: Runs
    memory: RunMemory | None
    arcs: Sequence[Arc]

    def cheapest(self, guesses: Iterable[float]) -> list[Half] | None:
        """Return the best steps, or None if memory allows none."""
        for guess in guesses:
            search = _Search.of(self, min(guess, self._most_seconds()), 1.0, weighs_memory=False)
            most = search.least(NOTHING)
            if most < math.inf:
                break
        else:
            return None
        if most > guess:
            search = _Search.of(self, most, 1.0, weighs_memory=False)
            most = search.least(NOTHING)
        most *= 1 + ROUNDING
        search = _Search.of(self, most, 1.0, weighs_memory=False)
        second = search.least(most) * (1 + ROUNDING)
        return search.path(Aim(True, most, second))

    def roomiest(self, scales: Iterable[float]) -> list[Half]:
        """Return the steps whose largest ratio of need to cap is smallest."""
        most = max(kind.cap_bytes for kind in self.runs.kinds)
        for scale in scales:
            bent = Bent(self.runs, self.runs.memory(most * scale), self.arcs)
            search = _Search.of(bent, self._most_seconds(), scale, weighs_memory=True)
            if search.least(NOTHING) < math.inf:
                return search.path(Aim(False, NOTHING, 0.0))
        raise AssertionError("without a cap everything fits")

    def _most_seconds(self) -> float:
        """More than any rank can have to do."""
        return float(2 * self.runs.elapsed[:, -1].max() + 1)


@dataclass(frozen=True, slots=True)
class _Search:
    """The programme for one guess: `low[state, i]` to `high[state, i]` are the ends j of what may be left."""

    bent: Bent
    tables: list[Tables]
    steps: list[Step]
    low: Ints
    high: Ints

    @staticmethod
    def of(bent: Bent, most_seconds: float, scale: float, *, weighs_memory: bool) -> "_Search":
        runs, memory = bent.runs, bent.memory
        no_table = np.zeros((1, 1))
        held = (memory.static, memory.held, memory.transient) if memory else (no_table,) * 3
        tables = [Tables(elapsed, runs.price, runs.num_bytes, *held) for elapsed in runs.elapsed]
        in_flight, num_ranks = runs.problem.in_flight, runs.problem.placement.num_ranks
        steps = [
            Step(
                in_flight[arc.stage],
                in_flight[2 * num_ranks - 1 - arc.stage],
                runs.kinds[arc.kind].cap_bytes,
                scale * (1 + ROUNDING),
                most_seconds * (1 + ROUNDING),
                is_last=arc.stage == num_ranks - 1,
                has_caps=memory is not None,
                weighs_memory=weighs_memory,
            )
            for arc in bent.arcs
        ]
        bands = [_band(bent.arcs, runs.mass, runs.share, most_seconds)]
        if memory is not None:
            bands.append(_band(bent.arcs, *runs.memory_mass(), scale))
        low = np.maximum.reduce([band[0] for band in bands])
        return _Search(bent, tables, steps, low, np.minimum.reduce([band[1] for band in bands]))

    def least(self, excepted: float) -> float:
        """Return the smallest load of the most loaded rank, one of up to `excepted` left out."""
        return float(np.nanmin(self._ends(self._sweep(Aim(False, excepted, 0.0)))))

    def path(self, aim: Aim) -> list[Half]:
        """Return the steps of the best path."""
        values = self._sweep(aim)
        ends = self._ends(values)
        flag, down = (int(index) for index in np.unravel_index(int(ends.argmin()), ends.shape))
        state, up, path = len(values) - 1, down, list[Half]()
        while state:
            best = ends[flag, down] if not path else values[state, flag, down, up - self.low[state, down]]
            for number, arc in enumerate(self.bent.arcs):
                if arc.after != state:
                    continue
                pull = self._pull(values, number, aim, down, up)
                if (pull.excepting if flag else pull.plain) == best:
                    break
            else:
                raise AssertionError("a value without a step that leads to it")
            path.append(Half(arc, down, up))
            state = arc.before
            if flag:
                down, up, flag = pull.excepting_down, pull.excepting_up, pull.excepting_flag
            else:
                down, up = pull.plain_down, pull.plain_up
        return path[::-1]

    def _pull(self, values: Floats, number: int, aim: Aim, down: int, up: int) -> Pull:
        arc = self.bent.arcs[number]
        low, step = self.low[arc.before], self.steps[number]
        return Pull(*_pull(values[arc.before], low, self.tables[arc.kind], step, aim, down, up))

    def _ends(self, values: Floats) -> Floats:
        """The values of a whole path: `[flag, spot of the turn]`."""
        spots = np.arange(self.low.shape[1])
        at = spots - self.low[-1]
        inside = (at >= 0) & (at < values.shape[3])
        return np.where(inside, values[-1][:, spots, np.where(inside, at, 0)], math.inf)

    def _sweep(self, aim: Aim) -> Floats:
        width = max(1, int((self.high - self.low).max()) + 1)
        values = np.full((len(self.low), 2, self.low.shape[1], width), math.inf)
        whole = len(self.bent.runs.spots) - 1
        if self.high[0, 0] < whole:
            return values
        values[0, 0, 0, whole - self.low[0, 0]] = 0.0
        for arc, step in zip(self.bent.arcs, self.steps, strict=True):
            before, after = values[arc.before], values[arc.after]
            low, low_after, high = self.low[arc.before], self.low[arc.after], self.high[arc.after]
            _fill(before, after, low, low_after, high, self.tables[arc.kind], step, aim)
        return values


def _band(arcs: Sequence[Arc], mass: Floats, share: Floats, most: float) -> tuple[Ints, Ints]:
    """Return for each state and front spot the first and last back spot that the mass allows."""
    most *= 1 + ROUNDING
    used = np.zeros(arcs[-1].after + 1)
    for arc in arcs:
        used[arc.after] = used[arc.before] + share[arc.kind]
    slack = ROUNDING * mass[-1]
    outside = mass[-1] + mass[None, :] - most * used[:, None] - slack
    inside = mass[None, :] + most * (used[-1] - used)[:, None] + slack
    low = np.searchsorted(mass, outside, side="left")
    high = np.searchsorted(mass, inside, side="right") - 1
    return low, high
