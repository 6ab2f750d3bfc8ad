"""What it takes to keep parameters the same that several ranks use."""

import pytest

from evenflow.ir.costs import Link
from evenflow.plan.chain import Parameter
from evenflow.plan.costs.shared import shared_seconds

TIED = Parameter("embedding", 25, 100, True, nodes=(0, 3, 5))
DOWN, UP = Link(1.0, 100.0), Link(0.0, 10.0)  # 2 s and 10 s for the parameter


def link(one, other):
    assert one != other
    return UP if one < other else DOWN


def seconds(positions, rank_of, parameter=TIED, gradient_bytes=1.0):
    return shared_seconds([parameter], positions, rank_of, link, gradient_bytes=gradient_bytes)


def test_the_gradient_comes_and_the_numbers_go_back():
    assert seconds((1,), (0, 1)) == 2.0 + 10.0


def test_every_rank_that_uses_it_has_its_turn():
    assert seconds((1, 4), (0, 1, 2)) == 2 * (2.0 + 10.0)


def test_every_stage_sends_its_gradient_and_a_rank_is_sent_the_numbers_once():
    assert seconds((1, 4), (0, 1, 1)) == 2 * 2.0 + 10.0


def test_what_stays_on_a_rank_takes_nothing():
    assert seconds((1, 4), (0, 0, 0)) == 0.0
    assert seconds((1, 2), (0, 1, 0)) == 0.0, "the stage on the other rank does not use it"


def test_gradients_may_be_of_another_size():
    assert seconds((1,), (0, 1), gradient_bytes=2.0) == 1.0 + 2.0 + 10.0


@pytest.mark.parametrize(
    "parameter", [Parameter("frozen", 25, 100, False, (0, 3)), Parameter("own", 25, 100, True, (3,))]
)
def test_what_nobody_shares_or_trains_takes_nothing(parameter):
    assert seconds((1,), (0, 1), parameter) == 0.0
