"""Whatever a taste prefers, its list is complete, fits the caps and takes what the exact checker says."""

import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import SECONDS, STRICT, Case, capped, cases, check, cost_of, equal, order_from

from evenflow.search.listing import Taste, listed
from evenflow.search.seeds import lifetimes, tastes
from evenflow.search.tables import tables_of
from evenflow.search.timing import INFEASIBLE, copy_trace, trace_for

SOME = settings(derandomize=True, deadline=None, max_examples=25)
objectives = st.sampled_from(["span", "makespan"])
seeds = st.integers(0, 2**32).map(random.Random)


@st.composite
def any_taste(draw: st.DrawFn, case: Case) -> Taste:
    num = case.placement.num_stages
    offsets = st.sampled_from([-1e3, *(-each for each in SECONDS), *SECONDS])
    return Taste(
        np.array(draw(st.lists(st.integers(1, 6), min_size=num, max_size=num))),
        np.array(draw(st.lists(offsets, min_size=2 * num, max_size=2 * num))),
        np.array([draw(st.sampled_from(SECONDS)), draw(st.sampled_from([0.0, 0.5, 1.0]))]),
        draw(st.sampled_from(SECONDS)),
    )


def check_list(case: Case, taste: Taste, objective) -> bool:
    """Check a list, if there is one."""
    tables = tables_of(case.instance, objective)
    trace = trace_for(tables)
    excess = listed(tables, trace, taste, INFEASIBLE, 0.0)
    if excess >= INFEASIBLE:
        return False
    letters, lengths = np.zeros_like(trace.letters), np.zeros_like(trace.counts)
    copy_trace(trace, letters, lengths)
    order = order_from(letters, lengths)
    check(case, order, excess, objective)
    assert cost_of(case.instance, order, objective, STRICT) == (excess, order)
    assert listed(tables, trace, taste, excess, 0.0) == excess
    assert listed(tables, trace, taste, excess - 0.1, 0.0) == INFEASIBLE
    return True


@SOME
@given(st.data(), cases(), seeds, objectives)
def test_a_list_of_any_taste_is_complete_and_fits(data, case, chosen, objective) -> None:
    taste = data.draw(any_taste(case))
    assert check_list(case, taste, objective), "without caps every taste gets to the end"
    check_list(capped(case, chosen), taste, objective)


def test_a_list_has_no_more_microbatches_in_flight_than_its_taste() -> None:
    instance = equal(range(3), num_microbatches=6, cap=6.0)
    tables = tables_of(instance, "span")
    trace = trace_for(tables)
    for caps in [(1, 1, 1), (3, 2, 1), (4, 4, 2)]:
        listed(tables, trace, Taste(np.array(caps), np.zeros(6), np.zeros(2), 0.0), INFEASIBLE, 0.0)
        for rank, cap in enumerate(caps):
            steps = [{rank: 1, 6 + rank: -1}.get(letter, 0) for letter in trace.letters[rank].tolist()]
            assert max(np.cumsum(steps)) == cap


@SOME
@given(cases(), seeds, objectives)
def test_first_tastes_make_lists(case, chosen, objective) -> None:
    costs = replace(case.costs, forward_seconds=(1.0,) * case.costs.num_stages)  # some work
    case = replace(case, costs=costs)
    for taste in tastes(case.instance):
        assert check_list(case, taste, objective)
    for taste in tastes(capped(case, chosen).instance):
        assert (taste.caps >= 1).all()
        check_list(capped(case, chosen), taste, objective)


def test_a_lifetime_is_the_way_to_the_last_stage_and_back() -> None:
    instance = equal((0, 1, 1, 0), num_microbatches=5, cap=2.0, latency=0.25)
    assert lifetimes(instance).tolist() == [
        # forwards and input gradients of half a second on the way, transfers, and the weight gradient
        8 * 0.5 + 4 * 0.25 + 0.5,
        6 * 0.5 + 2 * 0.25 + 0.5,
        4 * 0.5 + 2 * 0.25 + 0.5,
        2 * 0.5 + 0.5,
    ]
