"""Memory is a function of the order of ops, and agrees with exact sums."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brute_force
from evenflow.errors import ConfigError
from evenflow.ir import Backward, Costs, Flow, Forward, InputGrad, Overlap, Placement, Schedule, WeightGrad
from evenflow.memory import memory_curve, memory_faults, peak_bytes
from evenflow.simulate import simulate
from random_pipelines import Pipeline, pipelines

HALVES = replace(Costs.uniform(1), activation_bytes=(4.0,), weight_grad_bytes=(1.0,))


def by_hand(*ops) -> Schedule:
    return Schedule("by hand", Placement.linear(1), 2, (ops,))


@settings(derandomize=True, deadline=None)
@given(pipelines(), st.floats(0.3, 1.2))
def test_peaks_and_faults_agree_with_exact_sums(pipeline: Pipeline, share: float) -> None:
    schedule, costs = pipeline.schedule, pipeline.costs
    exact = [float(peak) for peak in brute_force.peaks(schedule, costs)]
    assert peak_bytes(schedule, costs) == pytest.approx(exact)
    capped = replace(costs, memory_caps=tuple(share * peak for peak in exact))
    over = [rank for rank, peak in enumerate(exact) if peak > share * peak]
    faults = memory_faults(schedule, capped)
    assert [fault.split()[1] for fault in faults] == [str(rank) for rank in over]


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_a_curve_rises_to_the_peak_and_ends_empty(pipeline: Pipeline) -> None:
    schedule, costs = pipeline.schedule, pipeline.costs
    timeline = simulate(schedule, pipeline.flow, costs)
    for rank, peak in enumerate(peak_bytes(schedule, costs)):
        curve = memory_curve(timeline, costs, rank)
        moments = [moment for moment, _ in curve]
        assert moments == sorted(set(moments))
        assert all(held <= peak + 1e-9 for _, held in curve)
        if curve and schedule.trains:
            assert curve[-1][1] == pytest.approx(0.0)


def test_each_kind_of_op_changes_what_is_held() -> None:
    schedule = by_hand(
        Forward(0, 0), Forward(0, 1), InputGrad(0, 0), InputGrad(0, 1), WeightGrad(0, 0), WeightGrad(0, 1)
    )
    curve = memory_curve(simulate(schedule, Flow.chain(1), HALVES), HALVES, rank=0)
    assert curve == ((0.0, 4.0), (1.0, 8.0), (3.0, 5.0), (4.0, 2.0), (5.0, 1.0), (6.0, 0.0))


def test_an_overlap_holds_both_while_it_runs() -> None:
    schedule = by_hand(Forward(0, 0), Overlap(Forward(0, 1), Backward(0, 0)), Backward(0, 1))
    assert peak_bytes(schedule, HALVES) == (8.0,)


def test_a_fault_names_the_first_op_over_the_cap_and_the_peak() -> None:
    ops = [Forward(0, 0), Forward(0, 1), Backward(0, 0), Backward(0, 1)]
    assert memory_faults(by_hand(*ops), replace(HALVES, memory_caps=(8.0,))) == []
    assert memory_faults(by_hand(*ops), replace(HALVES, memory_caps=(3.5,))) == [
        "rank 0 holds 4 in 0F0, over its cap of 3.5 (its peak is 8, in 0F1)"
    ]


def test_other_sizes_are_refused() -> None:
    schedule = by_hand(Forward(0, 0), Forward(0, 1))
    with pytest.raises(ConfigError, match="costs name 2 stages"):
        peak_bytes(schedule, Costs.uniform(2))
    with pytest.raises(ConfigError, match="memory_caps name 2 ranks, and there are 1"):
        memory_faults(schedule, replace(HALVES, memory_caps=(1.0, 2.0)))
