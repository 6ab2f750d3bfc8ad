"""The simulator respects every rule, prices transfers, and stands still for no one silently."""

import pytest
from hypothesis import given, settings

from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Backward, Costs, Flow, Forward, Placement, Schedule
from evenflow.rules import dependencies
from evenflow.schedules.gpipe import gpipe
from evenflow.simulate import simulate
from random_pipelines import Pipeline, pipelines


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_every_op_starts_as_early_as_the_rules_allow(pipeline: Pipeline) -> None:
    schedule, flow, costs = pipeline.schedule, pipeline.flow, pipeline.costs
    timeline = simulate(schedule, flow, costs)
    spans = {span.op: span for span in timeline.spans}
    assert len(spans) == sum(len(queue) for queue in schedule.ranks)
    for rank, queue in enumerate(schedule.ranks):
        free = 0.0
        for op in queue:
            arrivals = [
                spans[needed].end_seconds + (costs.transfer_seconds if spans[needed].rank != rank else 0.0)
                for needed in dependencies(op, flow)
            ]
            assert spans[op].rank == rank
            assert spans[op].start_seconds == max([free, *arrivals])
            assert spans[op].end_seconds == spans[op].start_seconds + costs.seconds(op)
            free = spans[op].end_seconds


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_spans_are_in_an_order_that_meets_every_dependency(pipeline: Pipeline) -> None:
    timeline = simulate(pipeline.schedule, pipeline.flow, pipeline.costs)
    starts = [span.start_seconds for span in timeline.spans]
    assert starts == sorted(starts)
    seen = set()
    for span in timeline.spans:
        assert set(dependencies(span.op, pipeline.flow)) <= seen
        seen.add(span.op)


def test_a_transfer_delays_other_ranks_only() -> None:
    costs = Costs.uniform(4, forward_seconds=1.0, transfer_seconds=10.0)
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
    assert "standstill: rank 0 stands before 0B0, which waits for 1B0 on rank 1" in str(caught.value)
    assert "standstill: rank 1 stands before 1F1, which waits for 0F1 on rank 0" in str(caught.value)
    assert "rank 1: 1F1 1F0 1B0 1B1" in str(caught.value)


def test_an_incomplete_schedule_is_refused() -> None:
    whole = gpipe(2, 1, 2)
    broken = Schedule("broken", whole.placement, 2, (whole.ranks[0], whole.ranks[1][:-1]))
    with pytest.raises(ScheduleError, match="1B1 is missing: rank 1 must run it"):
        simulate(broken, Flow.chain(2), Costs.uniform(2))


def test_costs_of_other_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="costs name 3 stages, schedule 'gpipe' has 2"):
        simulate(gpipe(2, 1, 2), Flow.chain(2), Costs.uniform(3))
