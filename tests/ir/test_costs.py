"""Costs that can't be costs are refused."""

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Costs, Forward


def test_an_op_has_its_stage_s_cost() -> None:
    costs = Costs((1.0, 2.0), (3.0, 4.0))
    assert costs.seconds(Forward(1, 9)) == 2.0
    assert costs.seconds(Backward(1, 9)) == 4.0


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_are_finite_and_not_negative(cost: float) -> None:
    with pytest.raises(ConfigError, match="finite seconds of at least 0"):
        Costs((cost,), (1.0,))
    with pytest.raises(ConfigError, match="finite seconds of at least 0"):
        Costs.uniform(1, transfer_seconds=cost)


def test_each_stage_has_both_costs() -> None:
    with pytest.raises(ConfigError, match="2 stages forward and 1 backward"):
        Costs((1.0, 1.0), (1.0,))
