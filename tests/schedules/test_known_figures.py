"""Bubbles and memory of 8 ranks and 32 microbatches, beside the best that is known of the same methods.

F, I and W of a rank take a second each, and a transfer a tenth of it or nothing.
"""

import pytest

from evenflow.ir import Costs, Flow, Placement, Schedule, Timeline
from evenflow.memory import peak_bytes
from evenflow.schedules.catalog import get
from evenflow.schedules.v_shape import v_queues
from evenflow.simulate import simulate

RANKS = 8
PRINTED = 5.1e-5  # four decimals


def timed(schedule: Schedule, latency_seconds: float) -> tuple[Timeline, float]:
    """The timeline, and the most microbatches that a rank holds."""
    each = (1.0,) * schedule.placement.num_ranks
    costs = Costs.of_ranks(schedule.placement, each, each, each, latency_seconds=latency_seconds)
    timeline = simulate(schedule, Flow.chain(schedule.placement.num_stages), costs)
    return timeline, max(peak_bytes(schedule, costs))


@pytest.mark.parametrize(
    ("name", "stages_per_rank", "latency_seconds", "span", "makespan", "peak"),
    [
        ("eager-1f1b", 1, 0.0, 0.1795, 0.1795, 15),
        ("eager-1f1b", 1, 0.1, 0.1892, 0.1892, 15),
        ("looped-bfs", 2, 0.0, 0.0986, 0.0986, 32),
        ("interleaved-zb", 1, 0.1, 0.0926, 0.0926, 8),
        ("interleaved-zb", 2, 0.1, 0.0689, 0.0707, 8),
        ("interleaved-zb", 4, 0.0, 0.0179, 0.0179, 8),
        ("interleaved-zb", 4, 0.1, 0.0675, 0.0693, 8),
        ("zb-v", 2, 0.0, 0.0, 0.0352, 8),
        ("zb-v", 2, 0.1, 0.0400, 0.0661, 8),
        ("v-half", 2, 0.0, 0.0813, 0.0813, 5),
        ("v-half", 2, 0.1, 0.1201, 0.1201, 5),
        ("v-min", 2, 0.0, 0.1152, 0.1152, 4),
        ("v-min", 2, 0.1, 0.2447, 0.2447, 4),
        ("dualpipe-v", 2, 0.0, 0.0680, 0.0680, 8.5),
    ],
)
def test_figures(name, stages_per_rank, latency_seconds, span, makespan, peak) -> None:
    timeline, held = timed(get(name)(RANKS, stages_per_rank, 32), latency_seconds)
    assert timeline.span_bubble == pytest.approx(span, abs=PRINTED)
    assert timeline.bubble == pytest.approx(makespan, abs=PRINTED)
    assert held == peak


@pytest.mark.parametrize("num_ranks", range(1, 13))
def test_zb_v_has_no_gap_between_equal_ops(num_ranks: int) -> None:
    for num_microbatches in (2 * num_ranks - 1, 2 * num_ranks, 4 * num_ranks + 1):
        timeline, _ = timed(get("zb-v")(num_ranks, 2, num_microbatches), 0.0)
        for lane in timeline.lanes:
            assert lane.start_seconds[1:] == lane.end_seconds[:-1]
        expected = (num_ranks - 1) / (6 * num_microbatches + num_ranks - 1)
        assert timeline.bubble == pytest.approx(expected)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (3, 4), (4, 4), (8, 8), (8, 12)])
def test_zb_v_with_few_microbatches_idles_less_than_zb_h1(num_ranks: int, num_microbatches: int) -> None:
    ours, _ = timed(get("zb-v")(num_ranks, 2, num_microbatches), 0.1)
    one_stage, _ = timed(get("zb-h1")(num_ranks, 1, num_microbatches), 0.1)
    assert ours.span_bubble < one_stage.span_bubble
    assert ours.bubble < one_stage.bubble


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_zb_v_holds_as_much_as_1f1b_for_any_number_of_microbatches(num_ranks: int) -> None:
    for num_microbatches in range(1, 2 * num_ranks + 2):
        _, held = timed(get("zb-v")(num_ranks, 2, num_microbatches), 0.0)
        assert held == min(num_microbatches, num_ranks)


@pytest.mark.parametrize("sizes", [(2, 2, 5), (4, 2, 8), (4, 3, 10), (5, 4, 21), (6, 2, 7), (8, 2, 8)])
def test_interleaved_zb_idles_less_than_interleaved_1f1b_and_holds_no_more(sizes) -> None:
    split, held = timed(get("interleaved-zb")(*sizes), 0.02)
    whole, held_by_whole = timed(get("interleaved-1f1b")(*sizes), 0.02)
    assert split.span_bubble < whole.span_bubble
    assert held <= held_by_whole


@pytest.mark.parametrize("num_ranks", [7, 9, 12, 16])
def test_less_memory_costs_time_in_the_v(num_ranks: int) -> None:
    found = [timed(get(name)(num_ranks, 2, 4 * num_ranks), 0.1) for name in ("zb-v", "v-half", "v-min")]
    spans = [timeline.span_bubble for timeline, _ in found]
    assert spans == sorted(spans)
    assert [held for _, held in found] == [num_ranks, num_ranks / 2 + 1, num_ranks // 3 + 2]


def idle_seconds(name: str, num_microbatches: int, latency_seconds: float) -> float:
    timeline, _ = timed(get(name)(4, 1, num_microbatches), latency_seconds)
    return timeline.makespan_seconds - 3 * num_microbatches


def test_eager_1f1b_waits_for_transfers_only_at_the_ends() -> None:
    half_a_round = 1.5
    assert idle_seconds("eager-1f1b", 40, half_a_round) == idle_seconds("eager-1f1b", 20, half_a_round)
    assert idle_seconds("eager-1f1b", 40, 1.6) > idle_seconds("eager-1f1b", 20, 1.6) + 1
    assert idle_seconds("1f1b", 40, 0.1) > idle_seconds("1f1b", 20, 0.1) + 1


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("num_microbatches", [1, 3, 9])
def test_the_v_keeps_to_any_limit_of_two_or_more(num_ranks: int, num_microbatches: int) -> None:
    placement = Placement.v_shape(num_ranks)
    for limit in range(2, 3 * num_ranks + 1):
        schedule = Schedule("v", placement, num_microbatches, v_queues(placement, num_microbatches, limit))
        assert max(peak_bytes(schedule, Costs.uniform(2 * num_ranks))) <= limit
