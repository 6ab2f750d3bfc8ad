"""The simulator respects every rule, prices transfers, and stands still for no one silently."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brute_force
from evenflow.errors import ConfigError, ScheduleError
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
from evenflow.schedules.gpipe import gpipe
from evenflow.simulate import simulate
from random_pipelines import Pipeline, pipelines


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pipelines())
def test_it_agrees_with_brute_force_in_exact_fractions(pipeline: Pipeline) -> None:
    schedule, flow, costs = pipeline.schedule, pipeline.flow, pipeline.costs
    timeline = simulate(schedule, flow, costs)
    exact = brute_force.times(schedule, flow, costs)
    assert exact is not None
    assert [lane.ops for lane in timeline.lanes] == list(schedule.ranks)
    for lane, times in zip(timeline.lanes, exact, strict=True):
        assert lane.start_seconds == pytest.approx([float(start) for start, _ in times])
        assert lane.end_seconds == pytest.approx([float(end) for _, end in times])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pipelines(), st.integers(0, 2**32))
def test_it_refuses_what_brute_force_cannot_run(pipeline: Pipeline, seed: int) -> None:
    schedule, flow = pipeline.schedule, pipeline.flow
    chance = random.Random(seed)
    ranks = [list(queue) for queue in schedule.ranks]
    queue = chance.choice(ranks)
    match chance.choice(("drop", "double", "swap")):
        case "drop":
            queue.pop(chance.randrange(len(queue)))
        case "double":
            queue.insert(chance.randrange(len(queue)), chance.choice(queue))
        case "swap":
            one, other = chance.randrange(len(queue)), chance.randrange(len(queue))
            queue[one], queue[other] = queue[other], queue[one]
    mutant = replace(schedule, ranks=tuple(map(tuple, ranks)))
    runs = brute_force.is_complete(mutant) and brute_force.times(mutant, flow, pipeline.costs) is not None
    try:
        simulate(mutant, flow, pipeline.costs)
    except ScheduleError:
        assert not runs
    else:
        assert runs


def test_a_link_carries_one_transfer_at_a_time() -> None:
    # Two values of 6 bytes at 2 bytes a second: the second waits for the first, and latency adds to both.
    costs = replace(
        Costs.uniform(2, 1.0), link=Link(latency_seconds=0.5, bytes_per_second=2.0), sent_bytes={(0, 1): 6.0}
    )
    ranks = ((Forward(0, 0), Forward(0, 1)), (Forward(1, 0), Forward(1, 1)))
    timeline = simulate(Schedule("by hand", Placement.linear(2), 2, ranks), Flow.chain(2), costs)
    assert timeline.lanes[1].start_seconds == [4.5, 7.5]


def test_an_overlap_takes_its_share_and_ends_as_one() -> None:
    costs = replace(Costs.uniform(1, 1.0, 2.0, 1.0), overlap_share=0.75)
    ranks = ((Forward(0, 0), Overlap(Forward(0, 1), Backward(0, 0)), Backward(0, 1)),)
    timeline = simulate(Schedule("by hand", Placement.linear(1), 2, ranks), Flow.chain(1), costs)
    assert timeline.lanes[0].end_seconds == [1.0, 4.0, 7.0]


def test_a_weight_gradient_waits_for_its_input_gradient() -> None:
    ranks = ((Forward(0, 0), WeightGrad(0, 0), InputGrad(0, 0)),)
    with pytest.raises(ScheduleError, match="rank 0 stands before 0W0, which waits for 0I0 on rank 0"):
        simulate(Schedule("by hand", Placement.linear(1), 1, ranks), Flow.chain(1), Costs.uniform(1))


def test_a_transfer_delays_other_ranks_only() -> None:
    costs = Costs.uniform(4, forward_seconds=1.0, latency_seconds=10.0)
    schedule = Schedule(
        "by hand",
        Placement((0, 0, 1, 1)),
        1,
        ((Forward(0, 0), Forward(1, 0)), (Forward(2, 0), Forward(3, 0))),
    )
    starts = [span.start_seconds for span in simulate(schedule, Flow.chain(4), costs).spans]
    assert starts == [0.0, 1.0, 12.0, 13.0]


def test_a_standstill_names_the_op_before_which_each_rank_stands() -> None:
    ranks = (
        (Forward(0, 0), Backward(0, 0), Forward(0, 1), Backward(0, 1)),
        (Forward(1, 1), Forward(1, 0), Backward(1, 0), Backward(1, 1)),
    )
    with pytest.raises(ScheduleError) as caught:
        simulate(Schedule("crossed", Placement.linear(2), 2, ranks), Flow.chain(2), Costs.uniform(2))
    assert "standstill: rank 0 stands before 0B0, which waits for 1I0 on rank 1" in str(caught.value)
    assert "standstill: rank 1 stands before 1F1, which waits for 0F1 on rank 0" in str(caught.value)
    assert "rank 1: 1F1 1F0 1B0 1B1" in str(caught.value)


def test_an_incomplete_schedule_is_refused() -> None:
    whole = gpipe(2, 1, 2)
    broken = Schedule("broken", whole.placement, 2, (whole.ranks[0], whole.ranks[1][:-1]))
    with pytest.raises(ScheduleError, match="1B1 is missing: rank 1 must run it"):
        simulate(broken, Flow.chain(2), Costs.uniform(2))


def test_costs_of_other_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="costs name 3 stages, and 2 are placed"):
        simulate(gpipe(2, 1, 2), Flow.chain(2), Costs.uniform(3))
