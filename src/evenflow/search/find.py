"""Find: the door of the search. It takes an instance and a budget, and returns the best order found."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from evenflow.bounds import Instance
from evenflow.errors import ScheduleError
from evenflow.ir.timeline import Objective
from evenflow.search.campaign import Report, campaign, laps
from evenflow.search.engine import Candidate, Engine
from evenflow.search.extend import extensions
from evenflow.search.tables import Ints, Order
from evenflow.search.timing import Letters

Progress: TypeAlias = Callable[[str, float], None]
Seeds: TypeAlias = Callable[[int], Iterable[Order]]

# What a budget in seconds means in ops timed, so that one seed gives one result on every machine. A core at
# 2.5 GHz times about 50 million.
OPS_PER_SECOND = 45e6
# Shares of the budget for few microbatches: where the direct way is tried too, and where that is too long.
FEW_SHARE, FEW_SHARE_OF_MANY = 0.5, 0.6
EXTENSION_SHARE = 0.3  # of those, at most, to extend what was found


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: the strict letters of each rank (`tables`), its objective in seconds, ops timed.

    The n-th occurrence of a letter on its rank is that letter's op of microbatch n.
    """

    order: Order
    value: float
    num_ops: float


def _no_seeds(_: int) -> Iterable[Order]:
    return ()


def find(
    instance: Instance,
    *,
    objective: Objective = "span",
    seeds: Seeds = _no_seeds,
    time_budget_seconds: float = 60.0,
    seed: int = 0,
    target: float = 0.0,
    progress: Progress | None = None,
) -> Found:
    """Return the best order found; never worse than the best of `seeds`.

    `seeds` gives orders, strict or lazy, for as many microbatches as it is asked for: those of the instance,
    and fewer. The budget is spent in ops and not by the clock, so the result depends on the arguments alone.
    A value of `target` or less ends the search. `progress` is called with each step's name and the best value
    so far.

    Raises `ScheduleError` for more stages than can be searched, and where no order was found within the caps.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> find(instance_of(Placement.linear(2), 2, Costs.uniform(2)), time_budget_seconds=0.01).value
    7.0
    """
    num_ranks, num_microbatches = instance.placement.num_ranks, instance.num_microbatches
    engine = Engine(instance, objective, seed=seed, target=target)
    budget = time_budget_seconds * OPS_PER_SECOND

    def report(step: str) -> None:
        if progress is not None:
            progress(step, engine.excess + engine.tables.base)

    for order in seeds(num_microbatches):
        _take(engine, order)
    report("known schedules")
    numbers = few_microbatches(num_ranks, num_microbatches)
    is_long = bool(numbers) and 2 * max(numbers) <= num_microbatches
    share = (FEW_SHARE_OF_MANY if is_long else FEW_SHARE) / max(1, len(numbers))
    for few in numbers:
        if not engine.done:
            small = Engine(replace(instance, num_microbatches=few), objective, seed=seed)
            for order in seeds(few):
                _take(small, order)
            campaign(small, budget * share, partial(_report_few, report, few))
            engine.spent += small.spent
            _extend(small, engine, budget * share * EXTENSION_SHARE)
            report("extended")
    if is_long and engine.leaders:
        laps(engine, budget - engine.spent, report)
    elif not engine.done:
        campaign(engine, budget - engine.spent, report)
    if not engine.leaders:
        raise ScheduleError(
            f"no order of {num_microbatches} microbatches on {num_ranks} ranks was found "
            f"within the memory caps {list(instance.caps)}: raise them, or cut the stages finer"
        )
    return Found(_order(engine.leaders[0]), engine.excess + engine.tables.base, engine.spent)


def few_microbatches(num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Return for how many microbatches to search first: warm-up, cool-down and some periods between.

    Two numbers, because what is found for one may have no steady state to repeat.

    >>> few_microbatches(num_ranks=8, num_microbatches=32)
    (20, 16)
    """
    numbers = (5 * num_ranks // 2, 2 * num_ranks)
    return tuple(few for few in numbers if few + 2 <= num_microbatches)


def _report_few(report: Report, few: int, step: str) -> None:
    report(f"{few} microbatches: {step}")


def _take(engine: Engine, order: Order) -> None:
    for lazy in (False, True):
        engine.timed(*_strings(order), lazy=lazy)


def _extend(small: Engine, engine: Engine, num_ops: float) -> None:
    """Give an engine what the leaders for few microbatches become for its own number of them."""
    stop = engine.spent + num_ops
    extra = engine.instance.num_microbatches - small.instance.num_microbatches
    for leader in small.leaders:
        small.timed(leader.order, leader.lengths, lazy=False)  # so that the trace is its own
        for order, lengths, lazy in extensions(small.tables, small.trace, extra=extra):
            for fill in (1.0, 0.5, 0.0) if lazy else (1.0,):
                if engine.spent > stop or engine.done:
                    return
                engine.timed(order, lengths, lazy=lazy, fill=fill)


def _order(candidate: Candidate) -> Order:
    return tuple(
        tuple(int(letter) for letter in letters[:length])
        for letters, length in zip(candidate.order, candidate.lengths, strict=True)
    )


def _strings(order: Order) -> tuple[Letters, Ints]:
    lengths = np.array([len(letters) for letters in order], np.int64)
    wide = np.zeros((len(order), int(lengths.max())), np.int16)
    for rank, letters in enumerate(order):
        wide[rank, : len(letters)] = letters
    return wide, lengths
