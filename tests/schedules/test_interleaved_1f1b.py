"""Interleaved 1F1B: the published order where there is one, and the same bubble for every other count."""

import pytest

from evenflow.ir import Costs, Flow
from evenflow.memory import peak_bytes
from evenflow.schedules.interleaved_1f1b import interleaved_1f1b
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.simulate import simulate


@pytest.mark.parametrize("stages_per_rank", range(1, 5))
@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_every_small_size_runs_in_its_closed_form(num_ranks: int, stages_per_rank: int) -> None:
    num_stages = num_ranks * stages_per_rank
    costs = Costs.uniform(num_stages)
    for num_microbatches in range(1, 3 * num_ranks + 3):
        schedule = interleaved_1f1b(num_ranks, stages_per_rank, num_microbatches)
        # Raises if an op is missing, repeated or misplaced, or if a rank stands still.
        timeline = simulate(schedule, Flow.chain(num_stages), costs)
        if num_microbatches >= num_ranks:
            num_rounds = stages_per_rank * num_microbatches + num_ranks - 1
        else:
            num_rounds = num_stages + num_microbatches - 1
        assert timeline.makespan_seconds == 3 * num_rounds


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_one_stage_a_rank_is_1f1b(num_ranks: int) -> None:
    for num_microbatches in range(1, 3 * num_ranks + 3):
        sizes = (num_ranks, 1, num_microbatches)
        assert interleaved_1f1b(*sizes).ranks == one_f_one_b(*sizes).ranks


def test_it_is_the_published_order_where_the_microbatches_divide() -> None:
    # Narayanan et al. 2021, figure 4 (bottom), for 2 ranks: groups of 2, and 4 and 2 forwards of warm-up.
    schedule = interleaved_1f1b(num_ranks=2, stages_per_rank=2, num_microbatches=4)
    assert [" ".join(map(str, queue)) for queue in schedule.ranks] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


@pytest.mark.parametrize("num_ranks", range(1, 7))
@pytest.mark.parametrize("stages_per_rank", range(2, 5))
def test_the_first_rank_holds_what_the_docstring_says(num_ranks: int, stages_per_rank: int) -> None:
    costs = Costs.uniform(num_ranks * stages_per_rank)
    for num_microbatches in range(1, 3 * num_ranks + 3):
        num_groups = max(1, num_microbatches // num_ranks)
        largest = -(-num_microbatches // num_groups)
        schedule = interleaved_1f1b(num_ranks, stages_per_rank, num_microbatches)
        assert peak_bytes(schedule, costs)[0] == min(
            stages_per_rank * num_microbatches, 2 * (num_ranks - 1) + (stages_per_rank - 1) * largest + 1
        )
