"""Schedules become letters without loss, and come back."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import STRICT, cases, cost_of, order_from, random_order, strings

from evenflow.bounds import instance_of
from evenflow.ir import (
    Backward,
    Costs,
    Flow,
    Forward,
    InputGrad,
    Link,
    Overlap,
    Placement,
    Schedule,
    WeightGrad,
)
from evenflow.ir.op import parts
from evenflow.schedules.catalog import SCHEDULES, default_stages_per_rank, get
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.search.tables import tables_of
from evenflow.search.translate import order_of, schedule_of
from evenflow.simulate import simulate

SOME = settings(derandomize=True, deadline=None, max_examples=50)


def halved(schedule: Schedule) -> tuple[tuple[object, ...], ...]:
    """The ops of each rank, overlaps one after the other and whole backwards in two."""

    def halves(op) -> list[object]:
        if isinstance(op, Backward):
            return [InputGrad(op.stage, op.microbatch), WeightGrad(op.stage, op.microbatch)]
        return [op]

    return tuple(
        tuple(half for op in queue for part in parts(op) for half in halves(part)) for queue in schedule.ranks
    )


@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 11])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_catalog_comes_back_in_halves(name: str, num_microbatches: int) -> None:
    schedule = get(name)(4, default_stages_per_rank(name), num_microbatches)
    back = schedule_of(order_of(schedule), schedule.placement, num_microbatches, "back")
    assert back.ranks == halved(schedule)
    assert (back.name, back.placement, back.num_microbatches) == (
        "back",
        schedule.placement,
        num_microbatches,
    )


@SOME
@given(cases(), st.integers(0, 2**32).map(random.Random))
def test_an_order_comes_back(case, chosen) -> None:
    order = random_order(case, chosen)
    assert order_of(case.schedule(order)) == order
    assert order_from(*strings(order)) == order


def test_an_overlap_is_its_ops_in_turn() -> None:
    queue = (Forward(0, 0), Overlap(Forward(0, 1), Backward(0, 0)), Backward(0, 1))
    schedule = Schedule("mine", Placement.linear(1), num_microbatches=2, ranks=(queue,))
    assert order_of(schedule) == ((0, 0, 1, 2, 1, 2),)


numbers = st.sampled_from([0.0, 0.25, 1.0, 3.0])


@SOME
@given(
    st.integers(2, 4),
    st.lists(numbers, min_size=24, max_size=24),
    st.builds(Link, numbers, st.sampled_from([0.5, 4.0, math.inf])),
)
def test_where_no_two_transfers_meet_the_time_is_the_simulators(num_ranks, drawn, link) -> None:
    edges = [edge for stage in range(num_ranks - 1) for edge in [(stage, stage + 1), (stage + 1, stage)]]
    costs = Costs(
        *(tuple(drawn[at : at + num_ranks]) for at in (0, 4, 8)),
        link=link,
        sent_bytes=dict(zip(edges, drawn[12:], strict=False)),
    )
    placement = Placement.linear(num_ranks)
    schedule = schedule_of(order_of(one_f_one_b(num_ranks, 1, 1)), placement, 1, "split")
    timeline = simulate(schedule, Flow.chain(num_ranks), costs)
    instance = instance_of(placement, 1, costs)
    base = tables_of(instance, "span").base
    assert cost_of(instance, order_of(schedule), "span", STRICT)[0] + base == timeline.span_seconds


def test_an_op_counts_its_microbatches_by_itself() -> None:
    schedule = schedule_of(((0, 0, 1, 2, 1, 2),), Placement.linear(1), 2, "tiny")
    assert schedule.ranks[0] == (
        Forward(0, 0),
        Forward(0, 1),
        InputGrad(0, 0),
        WeightGrad(0, 0),
        InputGrad(0, 1),
        WeightGrad(0, 1),
    )
