"""Engine: one instance under search. It owns the kernels' memory and the budget and keeps the best orders."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np

from evenflow.bounds import Instance
from evenflow.ir.timeline import Objective
from evenflow.search.anneal import anneal
from evenflow.search.chance import Cooling, chance
from evenflow.search.listing import Taste
from evenflow.search.tables import Ints, tables_of
from evenflow.search.timing import INFEASIBLE, Letters, Reading, copy_trace, run, trace_for
from evenflow.search.tune import Tastes, tune

NUM_LEADERS = 12
SPREAD = 0.3  # of the mean excess, beside the worst: so that the ranks that are not the worst improve too
LISTING_COST = 5.0  # of an op of a list beside one of `timing`, measured at 8 ranks and 32 microbatches


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A strict order, and how far its measure is above the longest rank's work."""

    excess: float
    order: Letters
    lengths: Ints


def best_of(candidates: Iterable[Candidate], num: int) -> list[Candidate]:
    """Return the best few of the feasible, without two of the same cost: these are mostly the same order.

    >>> best_of([], 2)
    []
    """
    distinct: dict[float, Candidate] = {}
    for candidate in candidates:
        if candidate.excess < INFEASIBLE:
            distinct.setdefault(round(candidate.excess, 9), candidate)
    return [distinct[excess] for excess in sorted(distinct)[:num]]


class Engine:
    """Runs the kernels on one instance; `spent` counts the ops that they timed, which is their cost.

    `leaders` are the best orders so far, which differ in their cost. At `target` seconds, or at the longest
    rank's work, a search may stop: `goal` is that as an excess. Heats are in mean op seconds.
    """

    def __init__(self, instance: Instance, objective: Objective, *, seed: int, target: float = 0.0) -> None:
        self.instance = instance
        self.tables = tables_of(instance, objective)
        self.goal = max(0.0, target - self.tables.base) + 1e-9
        self.trace = trace_for(self.tables)
        self.state = chance(seed)
        self.dice = Random(seed)
        self.size = len(self.tables.seconds) * instance.num_microbatches
        self.unit = float(self.tables.seconds.mean()) or 1.0
        self.spent = 0.0
        self.leaders: list[Candidate] = []

    @property
    def excess(self) -> float:
        """That of the best order so far; `INFEASIBLE` where none was within the caps."""
        return self.leaders[0].excess if self.leaders else INFEASIBLE

    @property
    def _num_timed(self) -> float:
        return float(self.trace.num_ops[0])

    @property
    def done(self) -> bool:
        """Whether the goal is reached."""
        return self.excess <= self.goal

    def timed(self, order: Letters, lengths: Ints, *, lazy: bool, fill: float = 1.0) -> Candidate:
        """Return what an order costs, and what it does: strict, whatever it was."""
        wide, used = self._blank()
        wide[:, : order.shape[1]] = order[:, : wide.shape[1]]
        cost = run(self.tables, self.trace, wide, lengths, Reading(lazy, fill, 0.0), INFEASIBLE)
        self.spent += self.size
        if cost < INFEASIBLE:
            copy_trace(self.trace, wide, used)
        return self._kept(Candidate(cost, wide, used))

    def tuned(self, taste: Taste, ops: float, *, hot: float = 1.0) -> Candidate:
        """Improve a taste in place; return the best list schedule on the way."""
        order, lengths = self._blank()
        tastes = Tastes(taste, _copy(taste), _copy(taste))
        cooling = self._cooling(ops / LISTING_COST, hot, 0.05)
        begin = self._num_timed
        excess = tune(self.tables, self.trace, tastes, SPREAD, self.state, cooling, self.unit, order, lengths)
        self.spent += (self._num_timed - begin) * LISTING_COST
        return self._kept(Candidate(excess, order, lengths))

    def annealed(self, start: Candidate, ops: float, *, lazy: bool, hot: float = 0.3) -> Candidate:
        """Return the best order found from `start` on, which is `start` at worst."""
        work, best = (start.order.copy(), start.lengths.copy()), self._blank()
        reading, cooling = Reading(lazy, 1.0, SPREAD), self._cooling(ops, hot, 0.02)
        begin = self._num_timed
        excess = anneal(self.tables, self.trace, *work, reading, self.state, cooling, *best, self.goal)
        self.spent += self._num_timed - begin
        return start if excess >= start.excess else self._kept(Candidate(excess, *best))

    def _cooling(self, num_ops: float, hot: float, cold: float) -> Cooling:
        return Cooling(max(num_ops, 1.0), hot * self.unit, cold * self.unit)

    def _kept(self, candidate: Candidate) -> Candidate:
        if len(self.leaders) < NUM_LEADERS or candidate.excess < self.leaders[-1].excess:
            self.leaders = best_of([*self.leaders, candidate], NUM_LEADERS)
        return candidate

    def _blank(self) -> tuple[Letters, Ints]:
        return np.zeros_like(self.trace.letters), np.zeros(len(self.tables.cap), np.int64)


def _copy(taste: Taste) -> Taste:
    return Taste(taste.caps.copy(), taste.offsets.copy(), taste.mood.copy(), taste.period)
