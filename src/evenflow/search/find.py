"""Find: the door of the search. It takes a problem and a budget, and returns the best order found."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from evenflow.errors import ScheduleError
from evenflow.ir.timeline import Objective
from evenflow.search.campaign import campaign, laps
from evenflow.search.engine import Candidate, Engine
from evenflow.search.extend import extensions
from evenflow.search.problem import Ints, Order, Problem
from evenflow.search.timing import INFEASIBLE, Letters

Progress: TypeAlias = Callable[[str, float], None]
Seeds: TypeAlias = Callable[[int], Iterable[Order]]

# What a budget in seconds means in ops timed, so that one seed gives one result on every machine. A core at
# 2.5 GHz times about 50 million.
OPS_PER_SECOND = 45e6
# Shares of the budget for few microbatches: where the direct way is tried too, and where that is too long.
FEW_SHARE, FEW_SHARE_OF_MANY = 0.3, 0.6


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: the strict letters of each rank (`problem`), its objective in seconds, ops timed.

    The n-th occurrence of a letter on its rank is that letter's op of microbatch n.
    """

    order: Order
    value: float
    num_ops: float


def _no_seeds(_: int) -> Iterable[Order]:
    return ()


def find(
    problem: Problem,
    *,
    objective: Objective = "span",
    seeds: Seeds = _no_seeds,
    time_budget_seconds: float = 60.0,
    seed: int = 0,
    target: float | None = None,
    progress: Progress | None = None,
) -> Found:
    """Return the best order found; never worse than the best of `seeds`.

    `seeds` gives orders, strict or lazy, for as many microbatches as it is asked for: those of the problem,
    and fewer. The budget is spent in ops and not by the clock, so the result depends on the arguments alone.
    A value of `target` or less ends the search. `progress` is called with each step's name and the best value
    so far.

    Raises `ScheduleError` where no order was found within the caps.

    >>> problem = Problem.linear(num_ranks=2, num_microbatches=2, cap=2.0)
    >>> find(problem, time_budget_seconds=0.01).value
    7.0
    """
    base = float(problem.work_seconds().max())
    goal = max(0.0, target - base) if target is not None else 0.0
    engine = Engine(problem, objective, seed=seed, goal=goal + 1e-9)
    budget = time_budget_seconds * OPS_PER_SECOND

    def report(step: str) -> None:
        if progress is not None:
            progress(step, engine.best.excess + base)

    known = _timed(engine, seeds(problem.num_microbatches))
    report("known schedules")
    few, many = few_microbatches(problem), problem.num_microbatches
    if few < many and not engine.done:
        is_long = many >= 2 * few
        share = budget * (FEW_SHARE_OF_MANY if is_long else FEW_SHARE)
        known += _by_extension(engine, few, objective, seed, seeds, share, report)
        if is_long:
            laps(engine, budget - engine.spent, report)
    if engine.best.excess >= INFEASIBLE or few >= many // 2:
        campaign(engine, known, budget - engine.spent, report)
    if engine.best.excess >= INFEASIBLE:
        raise ScheduleError(
            f"no order of {problem.num_microbatches} microbatches on {problem.num_ranks} ranks was found "
            f"within the memory caps {problem.cap_bytes.tolist()}: raise them, or cut the stages finer"
        )
    return Found(_order(engine.best), engine.best.excess + base, engine.spent)


def few_microbatches(problem: Problem) -> int:
    """Return for how many microbatches to search first: warm-up, cool-down and some periods between.

    >>> few_microbatches(Problem.linear(num_ranks=8, num_microbatches=32, cap=8.0))
    20
    """
    few = 5 * problem.num_ranks // 2
    return few if few + 2 <= problem.num_microbatches else problem.num_microbatches


def _timed(engine: Engine, orders: Iterable[Order]) -> list[Candidate]:
    return [engine.timed(*_strings(order), lazy=lazy) for order in orders for lazy in (False, True)]


def _by_extension(
    engine: Engine,
    few: int,
    objective: Objective,
    seed: int,
    seeds: Seeds,
    budget: float,
    report: Callable[[str], None],
) -> list[Candidate]:
    """Search for few microbatches, and return what the best order for them becomes for all of them."""
    small = Engine(engine.problem.with_microbatches(few), objective, seed=seed, goal=1e-9)
    campaign(small, _timed(small, seeds(few)), budget, lambda step: report(f"{few} microbatches: {step}"))
    engine.spent += small.spent
    if small.best.excess >= INFEASIBLE:
        return []
    small.timed(small.best.order, small.best.lengths, lazy=False)  # so that its trace is the best one's
    extra = engine.problem.num_microbatches - few
    made = [
        engine.timed(order, lengths, lazy=lazy, fill=fill)
        for order, lengths, lazy in extensions(small.tables, small.trace, extra=extra)
        for fill in ((1.0, 0.5, 0.0) if lazy else (1.0,))
    ]
    report("extended")
    return made


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
