"""The critical path: by hand, and as long as the makespan for whatever there is to schedule."""

from itertools import pairwise

import pytest
from hypothesis import given, settings

from evenflow.critical_path import critical_path
from evenflow.ir import Backward, Costs, Flow, Forward, InputGrad, Link, Placement, Schedule, Timeline, parts
from evenflow.rules import dependencies, results
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from random_pipelines import Pipeline, pipelines


def path_of(schedule: Schedule, flow: Flow, costs: Costs) -> list[str]:
    spans = critical_path(simulate(schedule, flow, costs), schedule, flow, costs)
    return [f"{span.rank}:{span.op}@{span.start_seconds:g}" for span in spans]


def test_the_slow_rank_is_the_path() -> None:
    costs = Costs((1.0, 5.0, 1.0), (1.0, 5.0, 1.0), (1.0, 5.0, 1.0))
    path = path_of(get("gpipe")(3, 1, 2), Flow.chain(3), costs)
    assert path == [
        "0:0F0@0",
        "1:1F0@1",
        "1:1F1@6",
        "2:2F1@11",
        "2:2B0@12",
        "1:1B0@14",
        "1:1B1@24",
        "0:0B1@34",
    ]


def test_a_latency_lies_between_two_ranks() -> None:
    costs = Costs.uniform(2, latency_seconds=0.5)
    path = path_of(get("sequential")(2, 1, 1), Flow.chain(2), costs)
    assert path == ["0:0F0@0", "1:1F0@1.5", "1:1B0@2.5", "0:0B0@5"]


def test_a_transfer_that_waits_for_the_link_counts_whole() -> None:
    # Two forwards of a second each, whose transfers occupy the link for three: the second leaves at 4.
    schedule = Schedule(
        "two", Placement.linear(2), 2, ((Forward(0, 0), Forward(0, 1)), (Forward(1, 0), Forward(1, 1)))
    )
    costs = Costs((1.0, 1.0), (0.0, 0.0), (0.0, 0.0), Link(0.25, 1.0), sent_bytes={(0, 1): 3.0})
    assert path_of(schedule, Flow.chain(2), costs) == ["0:0F0@0", "0:0F1@1", "1:1F1@7.25"]


def test_where_both_are_true_the_rank_counts() -> None:
    # 1F1 waits for its rank and for 0F1, which end at the same moment.
    schedule = get("forward-only")(2, 1, 2)
    assert path_of(schedule, Flow.chain(2), Costs.uniform(2)) == ["0:0F0@0", "1:1F0@1", "1:1F1@2"]


def test_nothing_has_no_path() -> None:
    schedule = Schedule("none", Placement.linear(1), 1, ((),))
    assert critical_path(Timeline.of(1, []), schedule, Flow.chain(1), Costs.uniform(1)) == ()


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_its_ops_and_transfers_last_as_long_as_the_makespan(pipeline: Pipeline) -> None:
    schedule, flow, costs = pipeline.schedule, pipeline.flow, pipeline.costs
    timeline = simulate(schedule, flow, costs)
    path = critical_path(timeline, schedule, flow, costs)
    compute = sum(costs.seconds(span.op) for span in path)
    gaps = [later.start_seconds - earlier.end_seconds for earlier, later in pairwise(path)]
    end = max(lane.end_seconds[-1] for lane in timeline.lanes)
    assert path[0].start_seconds == 0
    assert path[-1].end_seconds == end
    assert compute + sum(gaps) == pytest.approx(end)
    assert set(path) <= set(timeline.spans)


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_each_op_waits_for_the_one_before_it(pipeline: Pipeline) -> None:
    schedule, flow, costs = pipeline.schedule, pipeline.flow, pipeline.costs
    rank_of = schedule.placement.rank_of
    path = critical_path(simulate(schedule, flow, costs), schedule, flow, costs)
    for earlier, later in pairwise(path):
        queue = schedule.ranks[later.rank]
        if earlier.rank == later.rank:
            assert queue.index(earlier.op) + 1 == queue.index(later.op)
            assert earlier.end_seconds == later.start_seconds
        else:
            needed = set(dependencies(later.op, flow)) & set(results(earlier.op))
            assert needed
            link = costs.link_between(earlier.rank, later.rank)
            sizes = [
                costs.sent_bytes.get((result.stage, part.stage), 0.0)
                for part in parts(later.op)
                for result in dependencies(part, flow)
                if result in needed and rank_of[part.stage] == later.rank
            ]
            least = min(link.occupied_seconds(size) for size in sizes) + link.latency_seconds
            assert later.start_seconds - earlier.end_seconds >= least - 1e-9
    assert not isinstance(path[0].op, Backward | InputGrad)
