"""Searched orders: shorter than what the catalog has, within memory, for any number of microbatches."""

import random
from dataclasses import replace

import pytest
from test_planner import boxes, request

from evenflow.errors import ConfigError
from evenflow.ir.flow import Flow
from evenflow.lower import lower
from evenflow.plan.fit import at_cuts, groups_of
from evenflow.plan.own_order import OwnOrder, schedule_in, written_order
from evenflow.plan.plan import positions_in
from evenflow.plan.plan_file import read_plan, write_plan
from evenflow.plan.planner import plan
from evenflow.plan.price import chain_for
from evenflow.plan.request import Levers, Limits, choice_of
from evenflow.schedules import catalog
from evenflow.simulate import simulate
from evenflow.validate import prove

SHORT = 6e6  # bytes for four ranks: activations of few microbatches fit
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
    schedule, choice = schedule_in(read), choice_of(read)
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


def test_nothing_is_searched_where_the_schedule_is_given():
    free = asked_of(MIXED, 1, 1.0)
    assert plan(free).order
    named = asked_of(MIXED, 1, 1.0, schedule="1f1b")
    within = replace(free, limits=Limits(lambda choice: True, lambda choice: True))
    for asked in (named, within):
        assert not plan(asked).order
    assert plan(asked_of(MIXED, 1, 1.0, schedule="auto")).order == plan(free).order


def test_an_order_of_one_s_own_is_read_with_its_faults():
    made = plan(asked_of(MIXED, 1, 1.0))
    text = write_plan(made)
    assert read_plan(text.replace('  "0F0,', '  "0F0, ')) == replace(
        made, order=("0F0, " + made.order[0][4:], *made.order[1:])
    )
    for old, new, message in (
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
    ):
        assert old in text
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            read_plan(text.replace(old, new))


@pytest.mark.parametrize("name", ["gpipe", "zb-h1", "eager-1f1b", "zb-v", "dualpipe-v", "interleaved-zb"])
@pytest.mark.parametrize("seed", range(3))
def test_an_order_serves_any_number_of_microbatches(name, seed):
    drawn = random.Random(f"{name} {seed}")
    num_ranks, per_rank = drawn.randint(1, 4), catalog.default_stages_per_rank(name)
    try:
        own = catalog.get(name)(num_ranks, per_rank, 2 * num_ranks)
    except ConfigError as error:
        pytest.skip(str(error))
    method = OwnOrder(own)
    assert method(num_ranks, per_rank, own.num_microbatches) is own
    for number in range(1, 5 * num_ranks):
        made = method(num_ranks, per_rank, number)
        assert (made.num_microbatches, made.placement) == (number, own.placement)
        prove(lower(made, Flow.chain(own.placement.num_stages)))
    with pytest.raises(ConfigError, match="cannot serve"):
        method(num_ranks + 1, per_rank, 4)


def test_an_order_is_written_as_a_schedule_file_has_it():
    own = catalog.get("zb-h1")(2, 1, 2)
    assert [row.split(",") for row in written_order(own)] == [list(map(str, queue)) for queue in own.ranks]
