"""Listing: greedy schedules, each rank choosing among the ops that are ready.

A rank takes the ready op with the smallest key, `offset[letter] + period * microbatch`, and a weight gradient
where nothing else is ready. What makes such a list good is the number of microbatches that each stage may
have in flight, `caps`: it shapes the whole warm-up, and it keeps a late stage from starving of memory.
"""

from typing import NamedTuple

from evenflow.search.compiled import compiled, inlined
from evenflow.search.tables import Floats, Ints, Tables
from evenflow.search.timing import INFEASIBLE, NOTHING, Trace, arrival, clear, pending_weight, perform


class Taste(NamedTuple):
    """What a list prefers: see the module; `caps` and `offsets` are per stage and per letter.

    `mood[0]` is the patience in seconds: an op of smaller key that arrives so soon is waited for. `mood[1]`
    is the share of a weight gradient's seconds that a gap must have to be filled by it.
    """

    caps: Ints
    offsets: Floats
    mood: Floats
    period: float


@inlined
def weigh(tables: Tables, trace: Trace, rank: int, taste: Taste) -> None:
    """Choose a rank's next op: its letter to `trace.head`, the time of its decision to `trace.when`.

    A rank decides when its op is ready, or at once if a weight gradient waits.
    """
    num = len(tables.rank_of)
    start, stop = tables.stage_start[rank], tables.stage_start[rank + 1]
    horizon = INFEASIBLE
    for at in range(start, stop):
        stage = tables.stages[at]
        for letter in (stage, num + stage):
            microbatch = trace.done[letter]
            ready = INFEASIBLE
            if microbatch < tables.num_microbatches and (
                letter >= num
                or (
                    microbatch - trace.done[2 * num + stage] < taste.caps[stage]
                    and trace.memory[rank] + tables.taken[letter] <= tables.cap[rank]
                )
            ):
                arrives, cause = arrival(tables, trace, letter)
                if arrives >= 0.0:
                    ready = arrives
                    trace.reasons[letter] = cause
            trace.arrivals[letter] = ready
            horizon = min(horizon, ready)
    waits = trace.done_inputs[rank] > trace.done_weights[rank]
    free = trace.free[rank]
    trace.when[rank] = free if waits else max(horizon, free)
    horizon = max(horizon, free) + taste.mood[0]
    best, best_key = NOTHING, INFEASIBLE
    for at in range(start, stop):
        stage = tables.stages[at]
        for letter in (stage, num + stage):
            if trace.arrivals[letter] <= horizon and trace.arrivals[letter] < INFEASIBLE:
                key = taste.offsets[letter] + taste.period * trace.done[letter]
                if key < best_key:
                    best, best_key = letter, key
    trace.head[rank] = best


@inlined
def decide(tables: Tables, trace: Trace, rank: int, taste: Taste) -> int:
    """Let a rank do one op, and return its letter."""
    letter = trace.head[rank]
    ready = INFEASIBLE if letter == NOTHING else trace.arrivals[letter]
    gap = ready - trace.free[rank]
    if gap > 0.0 and trace.done_inputs[rank] > trace.done_weights[rank]:
        weight = pending_weight(tables, trace, rank, gap)
        if gap >= taste.mood[1] * tables.seconds[weight]:
            perform(tables, trace, rank, weight, 0.0, NOTHING, NOTHING)
            return int(weight)
    perform(tables, trace, rank, letter, ready, NOTHING, trace.reasons[letter])
    return int(letter)


@compiled
def listed(tables: Tables, trace: Trace, taste: Taste, limit: float, spread: float) -> float:
    """Make a list schedule; return its cost as `timing.run` does. The trace holds the order."""
    num, num_ranks = len(tables.rank_of), len(tables.cap)
    clear(tables, trace)
    left = 3 * num * tables.num_microbatches
    when = trace.when
    for rank in range(num_ranks):
        weigh(tables, trace, rank, taste)
    while left > 0:
        rank = 0
        for other in range(1, num_ranks):
            if when[other] < when[rank]:
                rank = other
        if when[rank] >= INFEASIBLE or trace.running[0] + spread * trace.running[1] > limit:
            return INFEASIBLE
        letter = decide(tables, trace, rank, taste)
        left -= 1
        weigh(tables, trace, rank, taste)
        if letter < 2 * num:
            for at in range(tables.wake_start[letter], tables.wake_start[letter + 1]):
                weigh(tables, trace, tables.wakes[at], taste)
    return float(trace.running[0] + spread * trace.running[1])
