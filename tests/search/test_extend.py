"""The steady state of a schedule is found, and repeating it makes a schedule for more microbatches."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import STRICT, cost_of, equal, order_from, strings

from brute_force import is_complete, peaks
from evenflow.bounds import Instance
from evenflow.ir import Costs
from evenflow.schedules.catalog import get
from evenflow.search.extend import extensions, windows
from evenflow.search.tables import Order, tables_of
from evenflow.search.timing import INFEASIBLE, Reading, run, trace_for
from evenflow.search.translate import order_of, schedule_of

SOME = settings(derandomize=True, deadline=None, max_examples=100)


@SOME
@given(st.lists(st.integers(0, 2), max_size=14), st.integers(1, 3))
def test_windows_are_where_each_letter_stands_equally_often(letters, repeats) -> None:
    size = 3 * repeats
    expected = [
        at
        for at in range(len(letters) - size + 1)
        if all(letters[at : at + size].count(letter) == repeats for letter in range(3))
    ]
    if len(set(letters)) == 3:
        found = windows(np.array(letters, np.int16), num_letters=3, repeats=repeats)
        assert found.tolist() == expected


# With the microbatches of its period.
METHODS = [
    ("1f1b", 3, 1, 1),
    ("eager-1f1b", 3, 1, 1),
    ("zb-h1", 3, 1, 1),
    ("zb-h2", 3, 1, 1),
    ("interleaved-1f1b", 2, 2, 2),
    ("interleaved-zb", 3, 2, 3),
    ("zb-v", 2, 2, 1),
    ("v-half", 3, 2, 1),
]


@dataclass(frozen=True)
class Tried:
    """An extension that was timed: `strict` is empty where it can't run."""

    extension: Order
    lazy: bool
    excess: float
    strict: Order


def extended(
    name: str, num_ranks: int, stages_per_rank: int, extra: int, latency: float
) -> tuple[float, Instance, list[Tried]]:
    """The excess of a schedule, the problem of more microbatches, and the schedule's extensions."""
    few = 3 * num_ranks
    schedule = get(name)(num_ranks, stages_per_rank, few)
    small = equal(schedule.placement.rank_of, num_microbatches=few, cap=2.0 * num_ranks - 1, latency=latency)
    large = replace(small, num_microbatches=few + extra)
    tables = tables_of(small, "span")
    trace = trace_for(tables)
    excess = run(tables, trace, *strings(order_of(schedule)), STRICT, INFEASIBLE)
    tried = []
    for order, lengths, lazy in extensions(tables, trace, extra=extra):
        longer = order_from(order, lengths)
        tried.append(Tried(longer, lazy, *cost_of(large, longer, "span", Reading(lazy, 1.0, 0.0))))
    return excess, large, tried


@pytest.mark.parametrize("periods", [1, 4])
@pytest.mark.parametrize(("name", "num_ranks", "stages_per_rank", "period"), METHODS)
def test_an_extension_is_a_schedule_for_more_microbatches(
    name, num_ranks, stages_per_rank, period, periods
) -> None:
    _, large, tried = extended(name, num_ranks, stages_per_rank, period * periods, latency=0.25)
    placement, many = large.placement, large.num_microbatches
    num = placement.num_stages
    assert any(each.strict for each in tried)
    for each in tried:
        kinds = 2 if each.lazy else 3
        for rank, queue in enumerate(each.extension):
            letters = [num * kind + stage for kind in range(kinds) for stage in placement.stages_on(rank)]
            assert sorted(queue) == sorted(letters * many)
        if each.strict:
            schedule = schedule_of(each.strict, placement, many, "longer")
            assert is_complete(schedule)
            assert cost_of(large, each.strict, "span", STRICT) == (each.excess, each.strict)
            held = Costs.of_ranks(placement, *[(1.0,) * num_ranks] * 3)
            assert max(peaks(schedule, held)) <= 2 * num_ranks - 1


@pytest.mark.parametrize("periods", [1, 2, 7])
@pytest.mark.parametrize(("name", "num_ranks", "stages_per_rank", "period"), METHODS)
def test_a_periodic_schedule_is_extended_without_new_gaps(
    name, num_ranks, stages_per_rank, period, periods
) -> None:
    excess, _, tried = extended(name, num_ranks, stages_per_rank, period * periods, latency=0.0)
    assert min(each.excess for each in tried) <= excess + 1e-9


def test_where_no_window_repeats_there_is_no_extension() -> None:
    _, _, tried = extended("interleaved-zb", 3, 2, 1, latency=0.0)  # its period is 3 microbatches
    assert tried == []
