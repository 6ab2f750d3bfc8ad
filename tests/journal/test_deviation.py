"""A plan beside its run: every number stands beside its own, and the furthest is the furthest in seconds."""

import dataclasses

import pytest

from evenflow.journal.deviation import Beside, fits, furthest, rank_numbers, stage_numbers, step_numbers
from small_runs import PLAN, RUN


def pairs(numbers):
    return [(each.what, each.planned, each.measured) for each in numbers]


def test_a_step_stands_beside_its_prediction():
    step, pipeline, rest = pairs(step_numbers(RUN, PLAN))
    assert step == ("step", 0.16, 0.2)
    assert pipeline == ("its pipeline", 0.15, 0.18)
    assert rest[1:] == pytest.approx((0.01, 0.02))


def test_ranks_and_stages_stand_beside_theirs():
    assert [pairs(rank) for rank in rank_numbers(RUN, PLAN)] == [
        [("rank 0, idle", 0.2, 0.25), ("rank 0, memory", 800.0, 1000)],
        [("rank 1, idle", 0.1, 0.2), ("rank 1, memory", 800.0, None)],
    ]
    whole, halves = stage_numbers(RUN, PLAN)
    assert pairs(whole) == [
        ("stage 0, forward", 0.010, 0.010),
        ("stage 0, backward", 0.020, 0.026),
        ("stage 0, input gradient", 0.010, None),
        ("stage 0, weight gradient", 0.010, None),
    ]
    assert [each.measured for each in halves] == [0.020, 0.035, 0.015, 0.020]


def test_a_plan_of_other_steps_is_compared_by_the_microbatch_alone():
    other = dataclasses.replace(RUN, num_microbatches=8)
    assert fits(RUN, PLAN)
    assert not fits(other, PLAN)
    assert [each.planned for each in step_numbers(other, PLAN)] == [None] * 3
    assert [each.planned for rank in rank_numbers(other, PLAN) for each in rank] == [None] * 4
    assert stage_numbers(other, PLAN) == stage_numbers(RUN, PLAN)


def test_without_a_plan_nothing_is_planned():
    numbers = [each for stage in stage_numbers(RUN, None) for each in stage]
    assert {each.planned for each in (*numbers, *step_numbers(RUN, None))} == {None}
    assert furthest(numbers) is None


def test_the_furthest_is_so_in_seconds_and_under_the_plan_too():
    numbers = [each for stage in stage_numbers(RUN, PLAN) for each in stage]
    assert furthest(numbers).what == "stage 0, backward"
    assert furthest([Beside("a", 1.0, 1.5), Beside("b", 1.0, 0.2)]).what == "b"
    assert furthest([Beside("a", 0.0, 9.0), Beside("b", 1.0, None)]) is None
