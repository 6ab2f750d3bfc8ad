"""Searched orders: shorter than what the catalog has, within memory, and kept in the plan's file."""

from dataclasses import replace

import pytest
from test_planner import boxes, request

from evenflow.errors import ConfigError
from evenflow.lower import lower
from evenflow.memory import peak_bytes
from evenflow.plan.own_order import own_schedule
from evenflow.plan.plan import positions_in
from evenflow.plan.plan_file import read_plan, write_plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Limits
from evenflow.plan.search import searched
from evenflow.plan.search.choices import choices
from evenflow.plan.search.fit import at_cuts, fitted, groups_of
from evenflow.plan.search.price import chain_for
from evenflow.simulate import simulate
from evenflow.validate import prove

SHORT = 5.7e6  # bytes for four ranks: activations of few microbatches fit
MIXED, EQUAL = ("H100", "A100", "H100", "A100"), ("H100",) * 4
CASES = [(MIXED, 1, 1.0), (MIXED, 2, 4.0), (EQUAL, 2, 1.0)]


def asked_of(names, per_rank, head, memory=SHORT, **levers):
    levers = Levers(pipeline=4, stages_per_rank=per_rank, recompute="none", **levers)
    return request(boxes(*names, memory=memory), rows=8, head=head, levers=levers)


@pytest.mark.parametrize(("names", "per_rank", "head"), CASES)
def test_a_searched_order_is_shorter_and_fits(names, per_rank, head):
    asked = asked_of(names, per_rank, head)
    known, found = plan(asked, search_seconds=0.0), plan(asked, search_seconds=1.0)
    assert (known.order, found.schedule) == ((), "auto")
    seconds = found.prediction.step_seconds
    assert found.prediction.bound_seconds <= seconds < 0.98 * known.prediction.step_seconds
    assert found.runners_up[0].step_seconds == known.prediction.step_seconds
    assert found.order == plan(asked, search_seconds=1.0).order

    # The order as a reader of the file has it, priced anew.
    read = read_plan(write_plan(found))
    assert read == found
    schedule, choice = own_schedule(read), read.choice
    chain = chain_for(asked, choice)
    fit = at_cuts(
        asked, choice, chain, positions_in(read, chain.names), groups_by(read, asked), schedule=schedule
    )
    assert max(fit.over_bytes) <= 0
    assert tuple(rank.memory for rank in read.ranks) == fit.memory
    took = simulate(schedule, fit.flow, fit.costs).makespan_seconds
    assert took == pytest.approx(read.prediction.pipeline_seconds, rel=1e-12)
    prove(lower(schedule, fit.flow))


def groups_by(made, asked):
    """The devices of each rank, as the plan says."""
    by_first = {group.first: group for group in groups_of(asked.cluster, made.degrees)}
    return [by_first[rank.place] for rank in made.ranks]


@pytest.fixture(scope="module")
def found():
    return plan(asked_of(MIXED, 1, 1.0), search_seconds=1.0)


def test_nothing_is_searched_where_the_schedule_is_given(found):
    assert found.order
    within = replace(asked_of(MIXED, 1, 1.0), limits=Limits(lambda choice: True, lambda choice: True))
    for asked in (asked_of(MIXED, 1, 1.0, schedule="1f1b"), within):
        assert not plan(asked).order


def test_the_room_for_activations_is_at_least_what_is_used():
    """So that what fits is a start of the search, also where the optimizer's step needs most."""
    for update_bytes in (0.0, 40.0):
        asked = asked_of(MIXED, 1, 1.0, memory=None)
        asked = replace(asked, state=replace(asked.state, update_bytes=update_bytes))
        start = replace(next(choices(asked)), recompute="none")
        chain = chain_for(asked, start)
        fit = fitted(asked, start, chain)
        caps = searched._searchable(fit, in_two=False).memory_caps
        used = peak_bytes(fit.schedule, fit.costs)
        assert all(cap >= own > 0 for cap, own in zip(caps, used, strict=True))
        spare = [cap - own for cap, own in zip(caps, used, strict=True)]
        assert spare == pytest.approx([-over for over in fit.over_bytes])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '  "0F0,',
            '  "0Q0,',
            "the plan's order cannot be read.*line 1, column 1: '0Q0' is not a compute op",
        ),
        ('  "0F0,', '  "1F0,', "line 1, column 1: 1F0 stands in the row of rank 0.* lives on rank 1"),
        (
            "num_microbatches = 8",
            "num_microbatches = 4",
            "order has 8 microbatches, and num_microbatches = 4",
        ),
        ('schedule = "auto"', 'schedule = "1f1b"', "brings an order of its own, and schedule = '1f1b'"),
        ("order = [", "order = []\nrows = [", "unknown key 'rows'"),
    ],
)
def test_a_wrong_order_is_refused_with_its_place(found, old, new, message):
    text = write_plan(found)
    assert old in text
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_plan(text.replace(old, new))


def test_auto_without_an_order_is_refused(found):
    with pytest.raises(ConfigError, match="schedule = 'auto' needs an order, and the plan has none"):
        read_plan(write_plan(replace(found, order=())))
