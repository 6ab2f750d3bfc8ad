"""The catalog: each name, what it refuses, and the bubble of those that have a closed form."""

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Costs, Flow, Forward, Schedule
from evenflow.schedules.catalog import SCHEDULES, default_stages_per_rank, get
from evenflow.schedules.sizes import check_workable
from evenflow.simulate import simulate

# The methods that serve one stage a rank alone, and those that serve two; all others serve any number.
ONE_STAGE = {"1f1b", "eager-1f1b", "zb-h1", "zb-h2", "zb-auto"}
TWO_STAGES = {"zb-v", "v-half", "v-min", "dualpipe-v"}


def _bubble(schedule: Schedule) -> float:
    num_stages = schedule.placement.num_stages
    return simulate(schedule, Flow.chain(num_stages), Costs.uniform(num_stages)).bubble


@pytest.mark.parametrize("name", ["gpipe", "looped-bfs", "1f1b", "eager-1f1b", "forward-only"])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 1), (2, 4), (4, 4), (4, 16), (8, 5)])
def test_bubble_is_the_closed_form(name: str, num_ranks: int, num_microbatches: int) -> None:
    expected = (num_ranks - 1) / (num_microbatches + num_ranks - 1)
    assert _bubble(get(name)(num_ranks, 1, num_microbatches)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_ranks", "stages_per_rank", "num_microbatches"), [(2, 3, 4), (4, 2, 4), (3, 2, 7)]
)
def test_more_stages_a_rank_shrink_the_bubble_breadth_first(
    num_ranks, stages_per_rank, num_microbatches
) -> None:
    schedule = get("looped-bfs")(num_ranks, stages_per_rank, num_microbatches)
    expected = (num_ranks - 1) / (stages_per_rank * num_microbatches + num_ranks - 1)
    assert _bubble(schedule) == pytest.approx(expected)
    assert schedule.ranks == get("gpipe")(num_ranks, stages_per_rank, num_microbatches).ranks


@pytest.mark.parametrize("num_microbatches", [1, 9])
def test_stop_and_wait_never_overlaps(num_microbatches: int) -> None:
    assert _bubble(get("sequential")(4, 2, num_microbatches)) == pytest.approx(3 / 4)


@pytest.mark.parametrize("num_microbatches", [2, 4, 12])
def test_1f1b_holds_few_activations(num_microbatches: int) -> None:
    for rank, queue in enumerate(get("1f1b")(4, 1, num_microbatches).ranks):
        steps = [1 if isinstance(op, Forward) else -1 for op in queue]
        peak = max(sum(steps[: position + 1]) for position in range(len(steps)))
        assert peak == min(4 - rank, num_microbatches)


@pytest.mark.parametrize("name", sorted(ONE_STAGE))
def test_methods_of_one_stage_a_rank_refuse_several(name: str) -> None:
    with pytest.raises(ConfigError, match="8 stages on 4 ranks"):
        get(name)(4, 2, 8)


@pytest.mark.parametrize("name", sorted(TWO_STAGES))
@pytest.mark.parametrize("stages_per_rank", [1, 3])
def test_methods_of_the_v_refuse_another_number_of_stages(name: str, stages_per_rank: int) -> None:
    with pytest.raises(ConfigError, match=f"got {4 * stages_per_rank} stages on 4 ranks.* count is 8 stages"):
        get(name)(4, stages_per_rank, 8)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sizes", [(0, 1), (-1, 1), (1, 0), (2, -1)])
def test_counts_below_one_are_refused(name: str, sizes: tuple[int, int]) -> None:
    num_ranks, num_microbatches = sizes
    on_each = default_stages_per_rank(name)
    with pytest.raises(ConfigError, match="at least 1, got"):
        get(name)(num_ranks, on_each, num_microbatches)
    with pytest.raises(ConfigError, match="at least 1, got"):
        get(name)(2, 0, 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_default_stages_per_rank_suit_the_method(name: str) -> None:
    assert get(name)(3, default_stages_per_rank(name), 4).name == name


def test_sizes_of_hours_are_refused() -> None:
    check_workable(num_ranks=1000, num_stages=1000, num_microbatches=1000 + 666)
    with pytest.raises(ConfigError, match="up to 6,000,000 ops, more than the 5,000,000"):
        check_workable(num_ranks=2, num_stages=2, num_microbatches=10**6)
    with pytest.raises(ConfigError, match="10000 ranks × 10000 stages make more than 50,000,000"):
        check_workable(num_ranks=10**4, num_stages=10**4, num_microbatches=1)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("gpip", "gpipe"), ("1F1B", "1f1b"), ("forward_only", "forward-only")]
)
def test_an_unknown_name_gets_the_nearest_and_all(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'") as caught:
        get(wrong)
    assert all(name in str(caught.value) for name in SCHEDULES)
