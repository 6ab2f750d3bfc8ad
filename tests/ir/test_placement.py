"""Placements: sizes, lookups, and what is refused."""

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Placement


def test_linear_is_one_stage_a_rank() -> None:
    placement = Placement.linear(3)
    assert (placement.num_stages, placement.num_ranks) == (3, 3)
    assert [placement.stages_on(rank) for rank in range(3)] == [(0,), (1,), (2,)]


def test_looped_deals_round_after_round() -> None:
    placement = Placement.looped(3, 2)
    assert placement.rank_of == (0, 1, 2, 0, 1, 2)
    assert placement.stages_on(2) == (2, 5)


@pytest.mark.parametrize("rank_of", [(), (1, 2), (0, 2), (0, -1)])
def test_ranks_without_gaps(rank_of: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"rank|stage"):
        Placement(rank_of)


@pytest.mark.parametrize(("num_ranks", "stages_per_rank"), [(0, 1), (1, 0), (-2, 1)])
def test_counts_below_one_are_refused(num_ranks: int, stages_per_rank: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Placement.looped(num_ranks, stages_per_rank)
