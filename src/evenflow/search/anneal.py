"""Anneal: simulated annealing over the strings of letters.

A move shifts one letter by a few places, most often a letter on the critical path of the worst rank; the same
shift is repeated on the letter's next occurrences, or on the stages that it feeds, because what helps one
microbatch helps its neighbours. In lazy strings a weight gradient is a hint that comes and goes.
"""

import math

from evenflow.search.chance import Cooling, State, below, geometric, heat_at, uniform
from evenflow.search.compiled import compiled
from evenflow.search.tables import Ints, Tables
from evenflow.search.timing import INFEASIBLE, NOTHING, Letters, Reading, Trace, copy_trace, run

# The journal of a try, to take it back: rows of (rank, from, to). An insertion comes from NOTHING, a removal
# goes to -2 - letter.
REMOVED = -2


@compiled
def shift(letters: Letters, source: int, target: int) -> None:
    """Move one letter of a string to another place, in place."""
    letter = letters[source]
    if source < target:
        for at in range(source, target):
            letters[at] = letters[at + 1]
    else:
        for at in range(source, target, -1):
            letters[at] = letters[at - 1]
    letters[target] = letter


@compiled
def beyond(letters: Letters, length: int, source: int, distance: int) -> int:
    """Return the place that lies `distance` letters of other kinds away; equal letters do not count."""
    letter = letters[source]
    at, step, left = source, (1 if distance > 0 else -1), abs(distance)
    while left > 0 and 0 <= at + step < length:
        at += step
        if letters[at] != letter:
            left -= 1
    return at


@compiled
def insert(order: Letters, lengths: Ints, rank: int, at: int, letter: int) -> None:
    """Put a letter into a rank's string, in place."""
    order[rank, lengths[rank]] = letter
    lengths[rank] += 1
    shift(order[rank], lengths[rank] - 1, at)


@compiled
def remove(order: Letters, lengths: Ints, rank: int, at: int) -> None:
    """Take a letter out of a rank's string, in place."""
    shift(order[rank], at, lengths[rank] - 1)
    lengths[rank] -= 1


@compiled
def take_back(order: Letters, lengths: Ints, journal: Ints, count: int) -> None:
    """Undo the steps of a try."""
    for row in range(count - 1, -1, -1):
        rank, source, target = journal[row, 0], journal[row, 1], journal[row, 2]
        if source == NOTHING:
            remove(order, lengths, rank, target)
        elif target <= REMOVED:
            insert(order, lengths, rank, source, REMOVED - target)
        else:
            shift(order[rank], target, source)


@compiled
def place_of(letters: Letters, length: int, letter: int, microbatch: int) -> int:
    """Return where a microbatch's letter stands in a string."""
    for at in range(length):
        if letters[at] == letter:
            if microbatch == 0:
                return at
            microbatch -= 1
    return NOTHING


@compiled
def shift_many(
    tables: Tables, order: Letters, lengths: Ints, journal: Ints, state: State, rank: int, at: int
) -> int:
    """Shift a letter and some of its kin; return how many steps were written to the journal."""
    num = len(tables.rank_of)
    letters, length, letter = order[rank], lengths[rank], order[rank, at]
    distance = 1 + geometric(state, 1.0 if uniform(state) < 0.7 else 8.0)
    if uniform(state) < 0.5:
        distance = -distance
    target = beyond(letters, length, at, distance)
    if target == at:
        return 0
    how = uniform(state)
    microbatch = 0
    if how < 0.25:
        for place in range(at):
            microbatch += letters[place] == letter
    shift(letters, at, target)
    journal[0, 0], journal[0, 1], journal[0, 2] = rank, at, target
    count = 1
    if how < 0.25 and letter < 2 * num:
        more = 1 + geometric(state, 2.0 if uniform(state) < 0.7 else 10.0)
        step = -1 if uniform(state) < 0.5 else 1
        stage = letter % num
        for _ in range(more):
            stage += step
            if stage < 0 or stage >= num or count >= len(journal):
                break
            other = letter - letter % num + stage
            rank = tables.rank_of[stage]
            at = place_of(order[rank], lengths[rank], other, microbatch)
            target = beyond(order[rank], lengths[rank], at, distance)
            if target != at:
                shift(order[rank], at, target)
                journal[count, 0], journal[count, 1], journal[count, 2] = rank, at, target
                count += 1
    elif how < 0.5:
        more = 1 + geometric(state, 2.0 if uniform(state) < 0.7 else 10.0)
        if uniform(state) < 0.2:
            more = length
        at = max(at, target) + 1
        while more > 0 and at < length and count < len(journal):
            if letters[at] == letter:
                target = beyond(letters, length, at, distance)
                if target != at:
                    shift(letters, at, target)
                    journal[count, 0], journal[count, 1], journal[count, 2] = rank, at, target
                    count += 1
                    more -= 1
                    at = max(at, target)
            at += 1
    return count


@compiled
def hint(
    tables: Tables, order: Letters, lengths: Ints, journal: Ints, state: State, rank: int, at: int
) -> int:
    """Insert a weight gradient or take one out; return how many steps were written to the journal."""
    num = len(tables.rank_of)
    journal[0, 0] = rank
    if order[rank, at] >= 2 * num or (uniform(state) < 0.3 and lengths[rank] > 1):
        for near in range(at, min(at + 8, lengths[rank])):
            letter = order[rank, near]
            if letter >= 2 * num:
                journal[0, 1], journal[0, 2] = near, REMOVED - letter
                remove(order, lengths, rank, near)
                return 1
        return 0
    if lengths[rank] >= order.shape[1]:
        return 0
    start, stop = tables.stage_start[rank], tables.stage_start[rank + 1]
    letter = 2 * num + tables.stages[start + below(state, stop - start)]
    journal[0, 1], journal[0, 2] = NOTHING, at
    insert(order, lengths, rank, at, letter)
    return 1


@compiled
def critical(trace: Trace, path: Ints) -> int:
    """Write the tokens of the worst rank's critical path as (rank, place); return how many there are."""
    rank = 0
    for other in range(1, len(trace.excess)):
        if trace.excess[other] > trace.excess[rank]:
            rank = other
    place = trace.counts[rank] - 1
    count = 0
    while place >= 0 and count < len(path):
        if trace.tokens[rank, place] != NOTHING:
            path[count, 0], path[count, 1] = rank, trace.tokens[rank, place]
            count += 1
        cause = trace.causes[rank, place]
        if cause == NOTHING:
            place -= 1
        else:
            microbatch = trace.microbatches[rank, place]
            place = trace.places[cause, microbatch]
            rank = trace.homes[cause]
    return count


@compiled
def anneal(
    tables: Tables,
    trace: Trace,
    order: Letters,
    lengths: Ints,
    reading: Reading,
    state: State,
    cooling: Cooling,
    best_order: Letters,
    best_lengths: Ints,
    target: float,
) -> float:
    """Improve `order` in place; write the best schedule as a strict order and return its excess."""
    cost = run(tables, trace, order, lengths, reading, INFEASIBLE)
    best = INFEASIBLE
    path = trace.path
    journal = trace.journal
    num_path = 0
    if cost < INFEASIBLE:
        best = trace.running[0]
        copy_trace(trace, best_order, best_lengths)
        num_path = critical(trace, path)
    begin = trace.num_ops[0]
    while best > target and trace.num_ops[0] - begin < cooling.num_ops:
        heat = heat_at(cooling, trace.num_ops[0] - begin)
        if num_path > 0 and uniform(state) < 0.7:
            pick = below(state, num_path)
            rank, at = path[pick, 0], path[pick, 1]
        else:
            rank = below(state, len(lengths))
            at = below(state, lengths[rank])
        if reading.lazy and uniform(state) < 0.1:
            count = hint(tables, order, lengths, journal, state, rank, at)
        else:
            count = shift_many(tables, order, lengths, journal, state, rank, at)
        if count == 0:
            trace.num_ops[0] += 1
            continue
        limit = cost - heat * math.log(1.0 - uniform(state))
        tried = run(tables, trace, order, lengths, reading, limit)
        if tried <= limit and tried < INFEASIBLE:
            cost = tried
            num_path = critical(trace, path)
            if trace.running[0] < best:
                best = trace.running[0]
                copy_trace(trace, best_order, best_lengths)
        else:
            take_back(order, lengths, journal, count)
    return best
