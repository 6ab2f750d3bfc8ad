"""Timing: what an order of letters costs, in time linear in its length.

One kernel serves two readings of an order. *Strict*: every weight gradient stands in the string and is done
there. *Lazy*: weight gradients have no successors, so the string of the others says it all: one is done where
memory is full, in every gap that is long enough, and at the end; those that stand in a lazy string are mere
hints, skipped when there is nothing to do. Lazy strings are the far smaller space to search.

Each rank runs ahead until it waits for another, which wakes it: no sorting, no rounds. A run ends early when
its cost has passed the limit, which most tries of an annealing do.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenflow.search.compiled import compiled, inlined
from evenflow.search.tables import Floats, Ints, Tables

Letters = npt.NDArray[np.int16]

INFEASIBLE = 1e300
NOTHING = -1


class Reading(NamedTuple):
    """How to read an order, and what it costs beyond its worst rank.

    `fill` is the share of a weight gradient's seconds that a gap must have to be filled by it. `spread` is
    the weight of the mean excess of all ranks, added to the excess of the worst.
    """

    lazy: bool
    fill: float
    spread: float


class Trace(NamedTuple):
    """The last run: memory for the kernels, overwritten by each.

    `letters[rank, i]` ran at `starts[rank, i]`, as token `tokens[rank, i]` of its order (`NOTHING` if it was
    decoded), waiting for letter `causes[rank, i]` (`NOTHING` for its rank). `excess[rank]` is what the rank's
    measure has above the longest work of all. `num_ops` counts the ops of all earlier runs: so budgets are
    spent.
    """

    letters: Letters
    starts: Floats
    tokens: Ints
    causes: Ints
    microbatches: Ints
    counts: Ints
    ends: Floats
    places: Ints
    done: Ints
    free: Floats
    memory: Floats
    excess: Floats
    head: Ints
    blocked: Ints
    ready: Ints
    running: Floats
    when: Floats
    arrivals: Floats
    reasons: Ints
    done_inputs: Ints
    done_weights: Ints
    homes: Ints
    path: Ints
    journal: Ints
    num_ops: Ints


def trace_for(tables: Tables) -> Trace:
    """Return the memory that the kernels need for one instance."""
    num_ranks, letters = len(tables.cap), len(tables.seconds)
    longest = 3 * tables.num_microbatches * int(np.diff(tables.stage_start).max())
    return Trace(
        letters=np.zeros((num_ranks, longest), np.int16),
        starts=np.zeros((num_ranks, longest)),
        tokens=np.zeros((num_ranks, longest), np.int64),
        causes=np.zeros((num_ranks, longest), np.int64),
        microbatches=np.zeros((num_ranks, longest), np.int64),
        counts=np.zeros(num_ranks, np.int64),
        ends=np.zeros((letters, tables.num_microbatches)),
        places=np.zeros((letters, tables.num_microbatches), np.int64),
        done=np.zeros(letters, np.int64),
        free=np.zeros(num_ranks),
        memory=np.zeros(num_ranks),
        excess=np.zeros(num_ranks),
        head=np.zeros(num_ranks, np.int64),
        blocked=np.zeros(num_ranks, np.int64),
        ready=np.zeros(num_ranks + 1, np.int64),
        running=np.zeros(2),
        when=np.zeros(num_ranks),
        arrivals=np.zeros(letters),
        reasons=np.zeros(letters, np.int64),
        done_inputs=np.zeros(num_ranks, np.int64),
        done_weights=np.zeros(num_ranks, np.int64),
        homes=np.tile(tables.rank_of, 3),
        path=np.zeros((letters * tables.num_microbatches, 2), np.int64),
        journal=np.zeros((tables.num_microbatches, 3), np.int64),
        num_ops=np.zeros(1, np.int64),
    )


@inlined
def clear(tables: Tables, trace: Trace) -> None:
    """Begin a run: nothing is done, every rank is free."""
    num_ranks = len(tables.cap)
    trace.num_ops[0] += len(trace.done)
    for rank in range(num_ranks):
        trace.num_ops[0] += trace.counts[rank]
    for letter in range(len(trace.done)):
        trace.done[letter] = 0
    trace.running[0] = tables.work[0] - tables.base
    trace.running[1] = 0.0
    for rank in range(num_ranks):
        trace.counts[rank] = 0
        trace.free[rank] = 0.0
        trace.memory[rank] = 0.0
        trace.excess[rank] = tables.work[rank] - tables.base
        trace.head[rank] = 0
        trace.blocked[rank] = NOTHING
        trace.done_inputs[rank] = 0
        trace.done_weights[rank] = 0
        trace.running[0] = max(trace.running[0], trace.excess[rank])
        trace.running[1] += trace.excess[rank] / num_ranks


@inlined
def perform(
    tables: Tables, trace: Trace, rank: int, letter: int, ready: float, token: int, cause: int
) -> None:
    """Do one op on a rank, no earlier than `ready`."""
    place = trace.counts[rank]
    start = trace.free[rank]
    gap = ready - start
    if gap > 0.0:
        start = ready
        if place > 0 or tables.from_zero:
            excess = trace.excess[rank] + gap
            trace.excess[rank] = excess
            trace.running[0] = max(trace.running[0], excess)
            trace.running[1] += gap / len(tables.cap)
    else:
        cause = NOTHING
    end = start + tables.seconds[letter]
    microbatch = trace.done[letter]
    trace.done[letter] = microbatch + 1
    trace.free[rank] = end
    trace.memory[rank] += tables.taken[letter] - tables.freed[letter]
    trace.ends[letter, microbatch] = end
    trace.places[letter, microbatch] = place
    trace.letters[rank, place] = letter
    trace.starts[rank, place] = start
    trace.tokens[rank, place] = token
    trace.causes[rank, place] = cause
    trace.microbatches[rank, place] = microbatch
    trace.counts[rank] = place + 1
    num = len(tables.rank_of)
    if letter >= 2 * num:
        trace.done_weights[rank] += 1
    elif letter >= num:
        trace.done_inputs[rank] += 1


@inlined
def pending_weight(tables: Tables, trace: Trace, rank: int, room: float) -> int:
    """Return a weight gradient that can be done now: the longest within `room`, or else the shortest."""
    num = len(tables.rank_of)
    best, best_seconds = NOTHING, 0.0
    if trace.done_inputs[rank] == trace.done_weights[rank]:
        return best
    for at in range(tables.stage_start[rank], tables.stage_start[rank + 1]):
        stage = tables.stages[at]
        letter = 2 * num + stage
        if trace.done[num + stage] > trace.done[letter]:
            seconds = tables.seconds[letter]
            fits, best_fits = seconds <= room, best_seconds <= room
            if (
                best == NOTHING
                or (fits and (not best_fits or seconds > best_seconds))
                or (not fits and not best_fits and seconds < best_seconds)
            ):
                best, best_seconds = letter, seconds
    return best


@inlined
def arrival(tables: Tables, trace: Trace, letter: int) -> tuple[float, int]:
    """Return when a letter's next microbatch may start and for whom it waits, or -1 and who is missing."""
    microbatch = trace.done[letter]
    ready, cause = 0.0, NOTHING
    for edge in range(tables.source_start[letter], tables.source_start[letter + 1]):
        source = tables.sources[edge]
        if trace.done[source] <= microbatch:
            return -1.0, source
        arrives = trace.ends[source, microbatch] + tables.delays[edge]
        if arrives > ready:
            ready, cause = arrives, source
    return ready, cause


@inlined
def advance(
    tables: Tables, trace: Trace, letters: Letters, length: int, reading: Reading, rank: int, num_ready: int
) -> int:
    """Run a rank until it waits, waking others; return how many ranks are ready then, or -1 for a fault."""
    num = len(tables.rank_of)
    head = trace.head[rank]
    while head < length:
        letter = letters[head]
        if letter >= 2 * num:
            if trace.done[letter] < trace.done[letter - num]:
                perform(tables, trace, rank, letter, 0.0, head, NOTHING)
            elif not reading.lazy:
                return -1
            head += 1
            continue
        ready, cause = arrival(tables, trace, letter)
        if ready < 0.0:
            trace.blocked[rank] = cause
            trace.head[rank] = head
            return num_ready
        while trace.memory[rank] + tables.taken[letter] > tables.cap[rank]:
            weight = pending_weight(tables, trace, rank, ready - trace.free[rank])
            if weight == NOTHING or not reading.lazy:
                return -1
            perform(tables, trace, rank, weight, 0.0, NOTHING, NOTHING)
        while reading.lazy and ready > trace.free[rank]:
            gap = ready - trace.free[rank]
            weight = pending_weight(tables, trace, rank, gap)
            if weight == NOTHING or gap < reading.fill * tables.seconds[weight]:
                break
            perform(tables, trace, rank, weight, 0.0, NOTHING, NOTHING)
        perform(tables, trace, rank, letter, ready, head, cause)
        head += 1
        for at in range(tables.wake_start[letter], tables.wake_start[letter + 1]):
            other = tables.wakes[at]
            if trace.blocked[other] == letter:
                trace.blocked[other] = NOTHING
                trace.ready[num_ready] = other
                num_ready += 1
    trace.head[rank] = head
    if reading.lazy:
        weight = pending_weight(tables, trace, rank, 0.0)
        while weight != NOTHING:
            perform(tables, trace, rank, weight, 0.0, NOTHING, NOTHING)
            weight = pending_weight(tables, trace, rank, 0.0)
    return num_ready


@compiled
def run(tables: Tables, trace: Trace, order: Letters, lengths: Ints, reading: Reading, limit: float) -> float:
    """Run an order; return its cost; `INFEASIBLE` at a standstill, over a cap, incomplete or above `limit`.

    The cost is the excess of the worst rank, plus `reading.spread` times the mean excess.
    """
    clear(tables, trace)
    num_ready = 0
    for rank in range(len(tables.cap)):
        trace.ready[num_ready] = rank
        num_ready += 1
        while num_ready > 0:
            num_ready -= 1
            other = trace.ready[num_ready]
            num_ready = advance(tables, trace, order[other], lengths[other], reading, other, num_ready)
            if num_ready < 0 or trace.running[0] + reading.spread * trace.running[1] > limit:
                return INFEASIBLE
    for rank in range(len(tables.cap)):
        if trace.head[rank] < lengths[rank] or trace.done_weights[rank] < trace.done_inputs[rank]:
            return INFEASIBLE
    return float(trace.running[0] + reading.spread * trace.running[1])


@inlined
def copy_trace(trace: Trace, order: Letters, lengths: Ints) -> None:
    """Write what the last run did as a strict order: every letter in the place where it ran."""
    for rank in range(len(trace.counts)):
        lengths[rank] = trace.counts[rank]
        for at in range(lengths[rank]):
            order[rank, at] = trace.letters[rank, at]
