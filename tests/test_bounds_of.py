"""Bounds of schedules: no schedule at any costs beats what is said of its placement."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from evenflow.bounds import instance_of
from evenflow.bounds_of import bounds_of
from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Costs, Flow, Link, Placement
from evenflow.memory import peak_bytes
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from random_pipelines import Pipeline, pipelines


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_no_schedule_beats_its_bounds(pipeline: Pipeline) -> None:
    schedule, flow = pipeline.schedule, Flow.chain(pipeline.schedule.placement.num_stages)
    costs = replace(pipeline.costs, memory_caps=peak_bytes(schedule, pipeline.costs))
    try:
        timeline = simulate(schedule, flow, costs)
    except ScheduleError:
        return  # it runs with more edges than a chain's alone
    bounds = bounds_of(schedule, costs)
    if not schedule.trains:
        assert bounds is None
        return
    assert bounds.span.seconds <= timeline.span_seconds * (1 + 1e-9) + 1e-9
    assert bounds.makespan.seconds <= timeline.makespan_seconds * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("num_stages", [3, 5])
def test_costs_of_other_stages_are_refused(num_stages: int) -> None:
    with pytest.raises(ConfigError, match=f"costs name {num_stages} stages, and 4 are placed"):
        bounds_of(get("gpipe")(4, 1, 4), Costs.uniform(num_stages))


def test_caps_of_other_ranks_are_refused() -> None:
    costs = replace(Costs.uniform(4), memory_caps=(1.0, 1.0))
    with pytest.raises(ConfigError, match="memory_caps name 2 ranks, and there are 4"):
        bounds_of(get("gpipe")(4, 1, 4), costs)


def test_no_microbatch_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_microbatches must be at least 1, got 0"):
        instance_of(Placement.linear(2), 0, Costs.uniform(2))


def test_delays_are_of_size_and_latency_and_none_within_a_rank() -> None:
    costs = replace(
        Costs.uniform(4, links={(1, 0): Link(2.0)}),
        link=Link(0.5, 4.0),
        sent_bytes={(0, 1): 2.0, (2, 1): 8.0, (3, 2): 8.0},
    )
    instance = instance_of(Placement.v_shape(2), 3, costs)
    assert instance.up_seconds == (1.0, 0.0, 2.0)
    assert instance.down_seconds == (2.0, 0.0, 2.5)


def test_a_cap_lower_than_a_microbatch_is_refused() -> None:
    with pytest.raises(ScheduleError, match="rank 0"):
        bounds_of(get("gpipe")(2, 1, 2), replace(Costs.uniform(2), memory_caps=(0.5, 1.0)))
