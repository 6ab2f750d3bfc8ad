"""Tune: simulated annealing over the taste of a list schedule.

Few numbers shape a whole schedule here, so a change reaches every microbatch at once: this finds the right
steady state where moves of single letters would need many steps through worse orders.
"""

import math
from typing import NamedTuple

from evenflow.search.chance import Cooling, State, below, geometric, heat_at, normal, uniform
from evenflow.search.compiled import compiled
from evenflow.search.listing import Taste, listed
from evenflow.search.tables import Ints, Tables
from evenflow.search.timing import INFEASIBLE, Letters, Trace, copy_trace


@compiled
def change(tables: Tables, taste: Taste, state: State, unit: float) -> None:
    """Change the taste at random, in place."""
    num = len(tables.rank_of)
    which = uniform(state)
    first = below(state, num)
    reach = geometric(state, 1.0) if uniform(state) < 0.5 else 0
    if which < 0.3:
        step = 1 if uniform(state) < 0.5 else -1
        for stage in range(first, min(first + reach + 1, num)):
            taste.caps[stage] = min(max(taste.caps[stage] + step, 1), tables.num_microbatches)
    elif which < 0.55:
        rank = tables.rank_of[first]
        start, stop = tables.stage_start[rank], tables.stage_start[rank + 1]
        other = tables.stages[start + below(state, stop - start)]
        if other != first and taste.caps[first] > 1:
            taste.caps[first] -= 1
            taste.caps[other] += 1
    elif which < 0.9:
        step_seconds = normal(state) * unit
        if uniform(state) < 0.5:
            first += num
        for letter in range(first, min(first + reach + 1, 2 * num)):
            taste.offsets[letter] += step_seconds
    elif which < 0.95:
        taste.mood[0] = max(0.0, taste.mood[0] + normal(state) * unit * 0.2)
    else:
        taste.mood[1] = min(max(taste.mood[1] + normal(state) * 0.2, 0.0), 1.0)


@compiled
def keep(taste: Taste, other: Taste) -> None:
    """Copy a taste into another."""
    for at in range(len(taste.caps)):
        other.caps[at] = taste.caps[at]
    for at in range(len(taste.offsets)):
        other.offsets[at] = taste.offsets[at]
    for at in range(len(taste.mood)):
        other.mood[at] = taste.mood[at]


class Tastes(NamedTuple):
    """The taste that is tried, the last accepted and the best: one is the copy of another, or changed."""

    tried: Taste
    accepted: Taste
    leader: Taste


@compiled
def tune(
    tables: Tables,
    trace: Trace,
    tastes: Tastes,
    spread: float,
    state: State,
    cooling: Cooling,
    unit: float,
    order: Letters,
    lengths: Ints,
) -> float:
    """Improve `tastes.tried` in place; write the best schedule to `order` and return its excess."""
    taste, accepted, leader = tastes
    cost = listed(tables, trace, taste, INFEASIBLE, spread)
    best, best_cost = INFEASIBLE, cost
    keep(taste, accepted)
    keep(taste, leader)
    if cost < INFEASIBLE:
        best = trace.running[0]
        copy_trace(trace, order, lengths)
    begin = trace.num_ops[0]
    while trace.num_ops[0] - begin < cooling.num_ops:
        heat = heat_at(cooling, trace.num_ops[0] - begin)
        change(tables, taste, state, unit)
        while uniform(state) < 0.3:
            change(tables, taste, state, unit)
        limit = cost - heat * math.log(1.0 - uniform(state))
        tried = listed(tables, trace, taste, limit, spread)
        if tried <= limit and tried < INFEASIBLE:
            cost = tried
            keep(taste, accepted)
            if cost < best_cost:
                best_cost = cost
                keep(taste, leader)
            if trace.running[0] < best:
                best = trace.running[0]
                copy_trace(trace, order, lengths)
        else:
            keep(accepted, taste)
    keep(leader, taste)
    return best
