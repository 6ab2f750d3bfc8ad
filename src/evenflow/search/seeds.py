"""Seeds: first tastes for list schedules, from how long a microbatch stays in each stage.

A steady state that starts one microbatch every `period` seconds holds `lifetime / period` of them in a stage,
so the caps of all stages are that line, stretched until the fullest rank is full, and lifted a little.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from evenflow.bounds import Instance
from evenflow.search.listing import Taste, listed
from evenflow.search.tables import Floats, Ints, Tables, tables_of
from evenflow.search.timing import INFEASIBLE, trace_for


def lifetimes(instance: Instance) -> Floats:
    """Return the seconds from a stage's forward to its weight gradient where one microbatch runs alone.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> lifetimes(instance_of(Placement.linear(2), 4, Costs.uniform(2))).tolist()
    [5.0, 3.0]
    """
    num = instance.placement.num_stages
    tables = tables_of(replace(instance, num_microbatches=1), "makespan")
    trace = trace_for(tables)
    alone = Taste(np.ones(num, np.int64), np.zeros(2 * num), np.zeros(2), 0.0)
    listed(tables, trace, alone, INFEASIBLE, 0.0)
    starts = trace.ends[:num, 0] - tables.seconds[:num]
    return np.asarray(trace.ends[num : 2 * num, 0] + tables.seconds[2 * num :] - starts)


def tastes(instance: Instance) -> Iterator[Taste]:
    """Yield tastes to begin with, the most usual first."""
    tables, num = tables_of(instance, "makespan"), instance.placement.num_stages
    period = tables.base / instance.num_microbatches or 1.0  # (no work at all)
    lives = lifetimes(instance) / period
    depth = np.arange(num, dtype=np.float64)
    later_first = -depth * 1e-3 * period
    inputs_first = np.full(num, -1e3 * period)
    flows = np.zeros(2 * num)
    flows[:num] = later_first
    flows[num:] = inputs_first + depth * 1e-3 * period
    age = np.concatenate((-lives, lives)) * period / 2
    for lift in (0.5, 0.0, 1.0, 2.0):
        caps = _stretched(tables, lives, lift)
        yield Taste(caps, flows.copy(), np.array([0.0, 1.0]), period)
        yield Taste(caps.copy(), flows * 0 + age, np.array([0.0, 1.0]), period)


def _stretched(tables: Tables, lives: Floats, lift: float) -> Ints:
    held = tables.taken[: len(lives)]  # by a forward of each stage

    def fits(caps: Floats) -> bool:
        return bool((np.bincount(tables.rank_of, caps * held) <= tables.cap).all())

    caps = np.ones(len(lives))
    for stretch in np.arange(0.02, 4.0, 0.02):
        tried = np.clip(np.floor(stretch * lives + lift), 1, tables.num_microbatches)
        if not fits(tried):
            break
        caps = tried
    return caps.astype(np.int64)
