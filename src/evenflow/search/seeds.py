"""Seeds: first tastes for list schedules, from how long a microbatch stays in each stage.

A steady state that starts one microbatch every `period` seconds holds `lifetime / period` of them in a stage,
so the caps of all stages are that line, stretched until the fullest rank is full, and lifted a little.
"""

from collections.abc import Iterator

import numpy as np

from evenflow.ir.costs import ROUNDING
from evenflow.search.listing import Taste, listed
from evenflow.search.problem import Floats, Problem
from evenflow.search.timing import INFEASIBLE, trace_for


def lifetimes(problem: Problem) -> Floats:
    """Return the seconds from a stage's forward to its weight gradient where one microbatch runs alone.

    >>> lifetimes(Problem.equal(range(2), num_microbatches=1, cap=1.0)).tolist()
    [5.0, 3.0]
    """
    num = problem.num_stages
    tables = problem.with_microbatches(1).tables("makespan")
    trace = trace_for(tables)
    alone = Taste(np.ones(num, np.int64), np.zeros(2 * num), np.zeros(2), 0.0)
    listed(tables, trace, alone, INFEASIBLE, 0.0)
    starts = trace.ends[:num, 0] - problem.forward_seconds
    return np.asarray(trace.ends[num : 2 * num, 0] + problem.weight_seconds - starts)


def tastes(problem: Problem) -> Iterator[Taste]:
    """Yield tastes to begin with, the most usual first."""
    num = problem.num_stages
    period = float(problem.work_seconds().max()) / problem.num_microbatches or 1.0  # (no work at all)
    lives = lifetimes(problem) / period
    depth = np.arange(num, dtype=np.float64)
    later_first = -depth * 1e-3 * period
    inputs_first = np.full(num, -1e3 * period)
    flows = np.zeros(2 * num)
    flows[:num] = later_first
    flows[num:] = inputs_first + depth * 1e-3 * period
    age = np.concatenate((-lives, lives)) * period / 2
    for lift in (0.5, 0.0, 1.0, 2.0):
        caps = _stretched(problem, lives, lift)
        yield Taste(caps, flows.copy(), np.array([0.0, 1.0]), period)
        yield Taste(caps.copy(), flows * 0 + age, np.array([0.0, 1.0]), period)


def _stretched(problem: Problem, lives: Floats, lift: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    def fits(caps: Floats) -> bool:
        held = np.bincount(problem.rank_of, caps * problem.stored_bytes, problem.num_ranks)
        return bool((held <= problem.cap_bytes * (1 + ROUNDING)).all())

    caps = np.ones(problem.num_stages)
    for stretch in np.arange(0.02, 4.0, 0.02):
        tried = np.clip(np.floor(stretch * lives + lift), 1, problem.num_microbatches)
        if not fits(tried):
            break
        caps = tried
    return caps.astype(np.int64)
