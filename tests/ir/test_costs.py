"""Costs that can't be costs are refused; the rest price every op."""

import math
import re
from dataclasses import replace

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Costs, Forward, InputGrad, Link, Overlap, Placement, WeightGrad

COSTS = Costs((1.0, 2.0), (3.0, 4.0), (0.5, 0.25))


def test_an_op_has_its_stage_s_cost() -> None:
    assert COSTS.seconds(Forward(1, 9)) == 2.0
    assert COSTS.seconds(InputGrad(1, 9)) == 4.0
    assert COSTS.seconds(WeightGrad(1, 9)) == 0.25
    assert COSTS.seconds(Backward(1, 9)) == 4.25
    assert replace(COSTS, overlap_share=0.5).seconds(Overlap(Forward(1, 9), Backward(0, 3))) == 2.75


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_are_finite_and_not_negative(cost: float) -> None:
    with pytest.raises(ConfigError, match="forward_seconds must be finite and at least 0"):
        Costs((cost,), (1.0,), (1.0,))
    with pytest.raises(ConfigError, match="latency must be finite seconds of at least 0"):
        Costs.uniform(1, latency_seconds=cost)
    with pytest.raises(ConfigError, match="sent_bytes must be finite and at least 0"):
        replace(COSTS, sent_bytes={(0, 1): cost})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_link_carries_something(rate: float) -> None:
    with pytest.raises(ConfigError, match="bandwidth must be above 0"):
        Link(0.0, rate)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Costs(
            (1.0, 1.0),
            (1.0,),
            (-1.0, 1.0),
            activation_bytes=(1.0, 1.0),
            weight_grad_bytes=(1.0, 2.0),
            memory_caps=(math.nan,),
            overlap_share=0.4,
        )
    assert str(caught.value).split("; ") == [
        "input_grad_seconds names 1 stages where forward_seconds names 2: give each stage one",
        "weight_grad_seconds must be finite and at least 0, got [-1.0]",
        "stage 1 keeps 2 bytes for its weight gradient, more than the 1 it holds",
        "memory_caps must lie between 0 and 1e+100, or be infinite, got [nan]",
        "overlap_share must lie between 0.5 and 1, got 0.4",
    ]


def test_memory_is_counted_in_microbatches_where_nothing_is_said() -> None:
    assert COSTS.activation_bytes == (1.0, 1.0)
    assert replace(COSTS, activation_bytes=(4.0, 6.0), weight_grad_bytes=()).weight_grad_bytes == (4.0, 6.0)


def test_a_rank_s_costs_are_shared_by_its_stages() -> None:
    costs = Costs.of_ranks(
        Placement((0, 1, 1, 0, 0)),
        (3.0, 2.0),
        (6.0, 4.0),
        (9.0, 8.0),
        latency_seconds=0.5,
        activation_bytes=(30.0, 10.0),
        weight_grad_bytes=(15.0, 10.0),
        memory_caps=(60.0, 20.0),
    )
    assert costs.forward_seconds == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert costs.weight_grad_seconds == (3.0, 4.0, 4.0, 3.0, 3.0)
    assert costs.activation_bytes == (10.0, 5.0, 5.0, 10.0, 10.0)
    assert costs.weight_grad_bytes == (5.0, 5.0, 5.0, 5.0, 5.0)
    assert costs.work_seconds(Placement((0, 1, 1, 0, 0)), 2, trains=True) == (36.0, 28.0)
    with pytest.raises(ConfigError, match=re.escape("costs of 1 ranks for 2: give each rank one")):
        Costs.of_ranks(Placement.linear(2), (1.0,), (1.0, 1.0), (1.0, 1.0))


def test_a_named_pair_of_ranks_has_its_own_link() -> None:
    costs = Costs.uniform(2, latency_seconds=1.0, links={(0, 1): Link(3.0)})
    assert [costs.link_between(*pair).latency_seconds for pair in ((0, 1), (1, 0))] == [3.0, 1.0]
