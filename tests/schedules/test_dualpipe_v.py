"""DualPipe-V: the bubble that its source states, in exact fractions, and its order for fewer microbatches."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from brute_force import times
from evenflow.ir import Costs, Flow, Overlap
from evenflow.schedules.dualpipe_v import dualpipe_v

# F, I, W and the share of F + B that a fused unit takes: from F + B down to B.
EQUAL_F_AND_I = [
    (1, 1, 1, 1.0),
    (1, 1, 1, 0.75),
    (5, 5, 4, 0.875),
    (3, 3, 1, 0.625),
    (2, 2, 0, 0.5),
    (7, 7, 7, 0.9),
]


def idle(num_ranks: int, num_microbatches: int, costs: Costs) -> list[Fraction]:
    """The exact seconds of the makespan in which each rank idles."""
    schedule = dualpipe_v(num_ranks, 2, num_microbatches)
    lanes = times(schedule, Flow.chain(2 * num_ranks), costs)
    assert lanes is not None
    makespan = max(lane[-1][1] for lane in lanes)
    return [makespan - sum(end - start for start, end in lane) for lane in lanes]


def stated(num_ranks: int, forward: int, input_grad: int, weight_grad: int, share: float) -> Fraction:
    """(p - 1) (F&B + B - 3 W)."""
    backward = input_grad + weight_grad
    fused = Fraction(share) * (forward + backward)
    return (num_ranks - 1) * (fused + backward - 3 * weight_grad)


def priced(num_ranks: int, forward: int, input_grad: int, weight_grad: int, share: float) -> Costs:
    uniform = Costs.uniform(2 * num_ranks, forward, input_grad, weight_grad)
    return replace(uniform, overlap_share=share)


@pytest.mark.parametrize("seconds", EQUAL_F_AND_I)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (3, 11), (8, 16), (8, 20)])
def test_the_bubble_is_the_stated_one(num_ranks, num_microbatches, seconds) -> None:
    found = idle(num_ranks, num_microbatches, priced(num_ranks, *seconds))
    assert found[-2] == found[-1] == max(found) == stated(num_ranks, *seconds)
    forward, input_grad, weight_grad, share = seconds
    saved = (1 - Fraction(share)) * (forward + input_grad + weight_grad)
    # Before these, each rank fuses a pair less than the next, and so works longer by what one pair saves.
    assert all(later - earlier == saved for earlier, later in pairwise(found[:-1]))


@pytest.mark.parametrize("seconds", [(1, 1, 1, 1.0), (5, 5, 4, 1.0)])
def test_all_ranks_idle_alike_where_fusing_saves_nothing(seconds) -> None:
    assert set(idle(8, 20, priced(8, *seconds))) == {stated(8, *seconds)}


@pytest.mark.parametrize("seconds", [(2, 3, 1, 0.875), (3, 4, 2, 1.0), (1, 6, 1, 1.0)])
def test_a_longer_input_gradient_idles_no_longer_than_stated(seconds) -> None:
    assert max(idle(8, 20, priced(8, *seconds))) <= stated(8, *seconds)


def test_the_last_rank_fuses_a_pair_less() -> None:
    fused = [sum(isinstance(op, Overlap) for op in queue) for queue in dualpipe_v(4, 2, 10).ranks]
    assert fused == [2 * 10 - 3 * 4 + 1, 10, 11, 11]


@pytest.mark.parametrize("num_microbatches", range(1, 8))
def test_too_few_microbatches_run_what_is_left_of_the_published_order(num_microbatches: int) -> None:
    whole = dualpipe_v(4, 2, 8)
    few = dualpipe_v(4, 2, num_microbatches)
    for queue, longer in zip(few.ranks, whole.ranks, strict=True):
        words = [word for op in longer for word in str(op).split("&")]
        left = [word for word in words if int(word[2:]) < num_microbatches]
        assert [word for op in queue for word in str(op).split("&")] == left
