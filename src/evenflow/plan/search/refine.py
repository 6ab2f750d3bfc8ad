"""Cuts moved a little, as long as that makes the step shorter.

A partition's most loaded rank does as little as can be. The shortest step may have other cuts: where stages
are unequal, filling and draining depend on which rank has how much, and where a rank has several stages, on
which of them has it. So what the search found is a start, from which cuts are moved: one, or several that
follow each other, all by as many places. A move counts if everything fits and the simulated step is shorter.
Where a rank has several stages, the cut with the most even stages is another start.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from evenflow.ir.costs import ROUNDING
from evenflow.ir.placement import Placement
from evenflow.plan.cuts.partition import partition
from evenflow.plan.cuts.problem import Kind, PartitionProblem
from evenflow.plan.request import Request
from evenflow.plan.search.fit import Fit, at_cuts
from evenflow.plan.search.price import Priced, priced_fit

_DISTANCES = (1, 2, 4)  # of a move, in places where a cut may stand
_MOST_OPS = 200_000  # simulated for one plan: a number, so that plans don't depend on the machine's speed


def refined(request: Request, priced: Priced) -> Priced:
    """The same choice with cuts from which no move helps, or the best of those that were tried.

    It is never slower. The nodes that are recomputed stay the same. Of a schedule with very many ops fewer
    moves are tried.
    """
    refiner = _Refiner(request, priced)
    found = refiner.descended(priced)
    if priced.choice.stages_per_rank > 1:
        even = refiner.at(_even(priced.fit))
        if even is not None:
            found = min(found, refiner.descended(even), key=lambda each: each.step_seconds)
    return found


class _Refiner:
    """What all moves of a choice's cuts have in common, and how many of them may still be simulated."""

    def __init__(self, request: Request, priced: Priced) -> None:
        self._request = request
        self._start = priced
        self._tries_left = _MOST_OPS // sum(map(len, priced.fit.schedule.ranks))
        # Of each kind of device: what all nodes before one take.
        self._before = {
            kind: (0.0, *accumulate(seconds.total)) for kind, seconds in priced.fit.chain.seconds.items()
        }

    def at(self, positions: tuple[int, ...]) -> Priced | None:
        """The choice with these cuts; None where it does not fit, or where enough was tried."""
        start = self._start
        fit = at_cuts(self._request, start.choice, start.fit.chain, positions, start.fit.groups)
        if self._tries_left <= 0 or max(fit.over_bytes) > 0:
            return None
        self._tries_left -= 1
        return priced_fit(self._request, start.choice, fit)

    def descended(self, best: Priced) -> Priced:
        """What moves lead to, each the first that makes the step shorter."""
        while (shorter := self._shorter(best)) is not None:
            best = shorter
        return best

    def _shorter(self, than: Priced) -> Priced | None:
        seconds = than.step_seconds * (1 - ROUNDING)
        for positions in _moves(than.fit.positions, than.fit.chain.legal):
            if self._tries_left <= 0:
                return None
            if self._least_seconds(positions) < seconds:
                found = self.at(positions)
                if found is not None and found.step_seconds < seconds:
                    return found
        return None

    def _least_seconds(self, positions: Sequence[int]) -> float:
        """What the most loaded rank computes in a step: no schedule is shorter."""
        start = self._start.fit
        loads = [0.0] * len(start.groups)
        bounds = (0, *positions, start.chain.num_nodes)
        for rank, (first, end) in zip(start.schedule.placement.rank_of, pairwise(bounds), strict=True):
            before = self._before[start.groups[rank].kind]
            loads[rank] += before[end] - before[first]
        return max(loads) * self._start.choice.num_microbatches


def _moves(positions: Sequence[int], legal: Sequence[bool]) -> Iterator[tuple[int, ...]]:
    """The cuts where a run of them is moved: short runs first, and short ways."""
    places = [0, *(place for place in range(1, len(legal)) if legal[place]), len(legal)]
    index = {place: at for at, place in enumerate(places)}
    bounds = [0, *(index[position] for position in positions), len(places) - 1]
    num_cuts = len(positions)
    for length in range(1, num_cuts + 1):
        for distance in _DISTANCES:
            for first in range(1, num_cuts - length + 2):
                for way in (-distance, distance):
                    run = [at + way for at in bounds[first : first + length]]
                    # Only its ends can meet others.
                    if bounds[first - 1] < run[0] and run[-1] < bounds[first + length]:
                        moved = (*bounds[1:first], *run, *bounds[first + length : -1])
                        yield tuple(places[at] for at in moved)


def _even(fit: Fit) -> tuple[int, ...]:
    """Where to cut so that the longest stage is as short as can be."""
    chain = fit.chain
    on_ranks = [Kind(group.kind, chain.seconds[group.kind].total) for group in fit.groups]
    kinds = tuple(on_ranks[rank] for rank in fit.schedule.placement.rank_of)
    return partition(
        PartitionProblem(Placement.linear(len(kinds)), kinds, chain.legal, chain.cut_bytes)
    ).positions
