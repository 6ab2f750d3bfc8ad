"""Runs: what any run of a chain's nodes takes and needs, looked up in numpy arrays.

Runs begin and end at *spots*: the chain's two ends and the places where a cut is legal. All indexes here
count spots; a run is named by its first spot and its last, or by the first and the number of steps between
spots.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenflow.plan.chain import Held
from evenflow.plan.cuts.problem import Kind, PartitionProblem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST_BYTES = 1e18  # stands for a cap that is infinite where shares of all caps are taken


class Others(NamedTuple):
    """What a rank does and needs for its other stages: seconds, bytes that add up, the largest transient."""

    seconds: float = 0.0
    num_bytes: float = 0.0
    transient: float = 0.0


@dataclass(frozen=True, slots=True)
class RunMemory:
    """What runs hold, in bytes: `[steps - 1, first]`, infinite where the chain ends before.

    Only as many steps are looked at as some run can have within `limit_bytes`.
    """

    limit_bytes: float
    static: Floats
    held: Floats
    transient: Floats

    def need(self, first: Ints, steps: Ints, in_flight: float, others: Others) -> Floats:
        """Return what the rank of a stage needs if that is the stage's run."""
        at = (steps - 1, first)
        return np.asarray(
            others.num_bytes
            + self.static[at]
            + (in_flight * self.held[at] if in_flight else 0.0)  # what is infinite stays so in `static`
            + np.maximum(self.transient[at], others.transient)
        )


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of a problem's chain.

    - `spots`: their node positions. `num_bytes`, `price`: of a cut at each spot; at both ends, and where only
      one rank is, 0.
    - `kinds`: the different ones; `kind_of[device]` is the index of a device's. `elapsed[kind, spot]`:
      seconds of all nodes before a spot.
    - `share[kind]`: of the work, if it is dealt out by speed; over all devices they add up to 1.
    - `mass[spot]`: for every node before it the smallest of share * seconds, so that no partition has a
      bottleneck below what is left of the mass over the shares that are left.
    """

    problem: PartitionProblem
    spots: Ints
    price: Floats
    num_bytes: Floats
    kinds: tuple[Kind, ...]
    kind_of: tuple[int, ...]
    elapsed: Floats
    share: Floats
    mass: Floats

    @staticmethod
    def of(problem: PartitionProblem) -> "Runs":
        """Return the runs of a problem."""
        spots = np.array([0, *problem.places, problem.num_nodes], dtype=np.int64)
        at_cuts = spots[1:-1] if problem.placement.num_ranks > 1 else spots[:0]
        price, num_bytes = np.zeros(len(spots)), np.zeros(len(spots))
        price[1 : len(at_cuts) + 1] = np.asarray(problem.cut_seconds, dtype=float)[at_cuts]
        num_bytes[1 : len(at_cuts) + 1] = np.asarray(problem.cut_bytes, dtype=float)[at_cuts]
        kinds = tuple(dict.fromkeys(problem.kinds))
        kind_of = tuple(kinds.index(kind) for kind in problem.kinds)
        seconds = np.array([kind.seconds for kind in kinds], dtype=float)
        elapsed = np.zeros((len(kinds), problem.num_nodes + 1))
        np.cumsum(seconds, axis=1, out=elapsed[:, 1:])
        speed = 1 / np.where(elapsed[:, -1] > 0, elapsed[:, -1], 1.0)
        share = speed / speed[list(kind_of)].sum()
        mass = np.concatenate([[0.0], np.cumsum((share[:, None] * seconds).min(axis=0))])
        return Runs(problem, spots, price, num_bytes, kinds, kind_of, elapsed[:, spots], share, mass[spots])

    @property
    def num_steps(self) -> int:
        """How many steps there are from the first spot to the last."""
        return len(self.spots) - 1

    def mean_seconds(self) -> float:
        """Return what the mean load, weighted by the shares, is at least in any partition and any order."""
        num_sent = sum(a != b for a, b in itertools.pairwise(self.problem.placement.rank_of))
        prices = np.sort(self.price[1:-1])[:num_sent].sum()
        return float(self.mass[-1] + 2 * self.share.min() * prices)

    def bound_seconds(self) -> float:
        """Return what the most loaded rank does at least, in any partition and any order of devices.

        The mean is no more than the largest, and the heaviest node lies somewhere.
        """
        heaviest = np.array([kind.seconds for kind in self.kinds]).min(axis=0).max(initial=0.0)
        return max(float(heaviest), self.mean_seconds())

    def seconds(self, kind: int, first: Ints, last: Ints) -> Floats:
        """Return what a stage takes if that is its run: its nodes, and the cuts on both its sides."""
        ends = self.elapsed[kind] + self.price
        starts = self.elapsed[kind] - self.price
        return np.asarray(ends[last] - starts[first])

    def memory_mass(self) -> tuple[Floats, Floats]:
        """Return `mass` and `share` of memory: bytes that some stage must have, and what is each kind's part.

        They are shares of all caps, so that no partition's largest ratio of need to cap is below what is left
        of the mass over the shares that are left.
        """
        problem = self.problem
        first = np.zeros(problem.num_nodes + 1)
        for groups, times in ((problem.static, 1.0), (problem.held, min(problem.in_flight))):
            for group in groups:
                first[min(group.nodes) + 1] += times * group.num_bytes
        caps = np.array([min(kind.cap_bytes, MOST_BYTES) for kind in self.kinds])
        whole = caps[list(self.kind_of)].sum()
        return np.cumsum(first)[self.spots] / whole, caps / whole

    def bound_ratio(self) -> float:
        """Return what the largest ratio of need to cap is at least, where not everything fits: 1 or more."""
        return max(1.0, float(self.memory_mass()[0][-1]))

    def memory_if_scarce(self) -> RunMemory | None:
        """Return what runs hold, or None where everything fits wherever it is cut."""
        problem = self.problem
        static, held = (sum(group.num_bytes for group in groups) for groups in (problem.static, problem.held))
        whole = static + max(problem.in_flight) * held
        num_stages = max(Counter(problem.placement.rank_of).values())
        caps = [kind.cap_bytes for kind in self.kinds]
        if num_stages * whole + max(problem.transient_bytes, default=0.0) <= min(caps):
            return None
        return self.memory(max(caps))

    def memory(self, limit_bytes: float) -> RunMemory:
        """Return what runs hold, for all runs that may need no more than the limit, and some that do."""
        least = min(self.problem.in_flight)
        static = _Counted.of(self.problem.static, self.spots)
        held = _Counted.of(self.problem.held, self.spots)
        per_step = np.maximum.reduceat(np.asarray(self.problem.transient_bytes, dtype=float), self.spots[:-1])
        transient = np.zeros(self.num_steps)
        rows: list[tuple[Floats, Floats, Floats]] = []
        for steps in range(1, self.num_steps + 1):
            valid = self.num_steps - steps + 1
            transient[:valid] = np.maximum(transient[:valid], per_step[steps - 1 :])
            transient[valid:] = math.inf
            rows.append((static.grown(steps), held.grown(steps), transient.copy()))
            if (rows[-1][0] + (least * rows[-1][1] if least else 0.0) + transient).min() > limit_bytes:
                break
        return RunMemory(limit_bytes, *(np.array(column) for column in zip(*rows, strict=True)))


class _Counted:
    """Bytes of groups, counted once in each run that has any of their nodes; runs grow step by step."""

    def __init__(self, fresh: Floats, again: dict[int, list[tuple[int, float]]]) -> None:
        self._fresh = fresh  # what a step adds to a run that ends with it
        self._again = (
            again  # by distance: steps that have what the step so far before them had, and its bytes
        )
        self._sums = np.zeros(len(fresh))

    @staticmethod
    def of(groups: Sequence[Held], spots: Ints) -> "_Counted":
        fresh = np.zeros(len(spots) - 1)
        again: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for group in groups:
            steps = sorted({int(np.searchsorted(spots, node, side="right")) - 1 for node in group.nodes})
            fresh[steps] += group.num_bytes
            for earlier, later in itertools.pairwise(steps):
                again[later - earlier].append((later, group.num_bytes))
        return _Counted(fresh, again)

    def grown(self, steps: int) -> Floats:
        """Return the bytes of each run of so many steps; call it with 1, 2, 3 and so on."""
        for step, num_bytes in self._again.get(steps - 1, ()):
            self._fresh[step] -= num_bytes
        valid = len(self._sums) - steps + 1
        self._sums[:valid] += self._fresh[steps - 1 :]
        self._sums[valid:] = math.inf
        return self._sums.copy()
