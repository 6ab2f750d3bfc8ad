"""Campaign: which way of making schedules gets which share of a budget.

Two families make first schedules beside the known ones, because none wins everywhere: lists are good where
memory is tight or costs are unequal, merges on looped placements. The best of each are annealed for a while
before they are compared; then the field is cut twice.

Rejected: periodic schedules whose offsets are annealed. Beside the extension of schedules for few
microbatches (`extend`), which finds the periods by itself, they took a fifth of the budget and won nowhere.
"""

from collections.abc import Callable
from typing import TypeAlias

from evenflow.search.engine import Candidate, Engine, best_of
from evenflow.search.merge import Merge, merged, merges, varied
from evenflow.search.seeds import tastes
from evenflow.search.timing import INFEASIBLE

Report: TypeAlias = Callable[[str], None]

# Shares of a campaign's budget. The rest, about a third, goes to the laps on the best order of all.
FIRST_LIST, LONG_LIST, MERGES, CLIMB = 0.006, 0.02, 0.01, 0.005
FIELD, FINAL = 0.25, 0.15
NUM_LAPS = 3


def campaign(engine: Engine, budget: float, report: Report) -> None:
    """Search with about `budget` ops, from the leaders of the engine and schedules of all families."""
    stop = engine.spent + budget
    field = engine.leaders[:3]
    for step, make in (("lists", _lists), ("merges", _merges)):
        field += make(engine, budget)
        report(step)
        if engine.done:
            return
    field = best_of(field, 5)
    field = [engine.annealed(each, budget * FIELD / len(field), lazy=False) for each in field]
    report("field")
    for each in best_of(field, 3):
        engine.annealed(each, budget * FINAL / 3, lazy=False)
    report("final")
    laps(engine, stop - engine.spent, report)


def laps(engine: Engine, budget: float, report: Report) -> None:
    """Anneal the best order again and again, ever cooler; its weight gradients are fixed or free in turn."""
    for lap in range(NUM_LAPS):
        for lazy in (False, True):
            if engine.done or not engine.leaders:
                return
            engine.annealed(engine.leaders[0], budget / NUM_LAPS / 2, lazy=lazy, hot=0.3 / (lap + 1))
        report(f"lap {lap + 1} of {NUM_LAPS}")


def _lists(engine: Engine, budget: float) -> list[Candidate]:
    first = [(engine.tuned(taste, budget * FIRST_LIST), taste) for taste in tastes(engine.instance)]
    first.sort(key=lambda made: made[0].excess)
    longer = [engine.tuned(taste, budget * LONG_LIST, hot=0.6) for _, taste in first[:2]]
    return best_of([*(made for made, _ in first), *longer], 3)


def _merges(engine: Engine, budget: float) -> list[Candidate]:
    stop, made = engine.spent + budget * MERGES, []
    for merge in merges(engine.instance):
        made.append((_merged(engine, merge), merge))
        if engine.spent > stop:
            break
    made.sort(key=lambda pair: pair[0].excess)
    best, merge = made[0]
    stop += budget * CLIMB
    while engine.spent < stop and best.excess < INFEASIBLE:
        changed = varied(merge, engine.dice)
        tried = _merged(engine, changed)
        if tried.excess <= best.excess:
            best, merge = tried, changed
    return best_of([best, *(candidate for candidate, _ in made)], 2)


def _merged(engine: Engine, merge: Merge) -> Candidate:
    order, lengths = merged(engine.instance, merge)
    return engine.timed(order, lengths, lazy=True, fill=merge.fill)
