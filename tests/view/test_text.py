"""Drawings: what they show, and that they keep to their width."""

import pytest

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Costs, Flow, Forward, Span, Timeline
from evenflow.schedules.catalog import SCHEDULES, default_stages_per_rank, get
from evenflow.simulate import simulate
from evenflow.view.text import draw_schedule, draw_timeline


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (3, 4), (11, 12)])
def test_the_table_holds_every_op_once_and_is_aligned(
    name: str, num_ranks: int, num_microbatches: int
) -> None:
    schedule = get(name)(num_ranks, default_stages_per_rank(name), num_microbatches)
    header, *rows = draw_schedule(schedule).splitlines()
    assert header.split()[0] == "time"
    assert len(rows) == num_ranks
    for rank, row in enumerate(rows):
        words = [word for word in row.split()[2:] if word.strip(".-")]
        assert words == [str(op) for op in schedule.ranks[rank]]
    slot = header.index(" 1 ") + 1 if " 1 " in header else 0
    assert all(row[slot - 1] == " " for row in rows if slot)


def test_a_timeline_is_drawn_to_scale() -> None:
    timeline = Timeline.of(
        2,
        (
            Span(0, Forward(0, 7), 5.0, 5.001),
            Span(1, Forward(1, 7), 5.001, 5.002),
            Span(1, Backward(1, 7), 5.002, 5.004),
        ),
    )
    assert draw_timeline(timeline, width=20).splitlines() == [
        "rank 0 |0F7>>               |  25% busy",
        "rank 1 |     1F7>>1B7<<<<<<<|  75% busy",
        "makespan 4.000 ms, bubble 50.0%",
    ]


@pytest.mark.parametrize("width", [10, 37, 100])
def test_a_crowded_timeline_keeps_its_width(width: int) -> None:
    timeline = simulate(get("1f1b")(4, 1, 60), Flow.chain(4), Costs.uniform(4, 0.001, 0.002, 0.0003))
    *lanes, last = draw_timeline(timeline, width=width).splitlines()
    assert [len(lane.split("|")[1]) for lane in lanes] == [width] * 4
    assert last.startswith("makespan")


def test_even_the_shortest_op_is_visible() -> None:
    spans = (
        Span(0, Forward(0, 0), 0.0, 9.0),
        Span(0, Backward(0, 0), 11.0, 11.001),
        Span(0, Forward(0, 1), 14.0, 20.0),
    )
    assert draw_timeline(Timeline.of(1, spans), width=10).count("<") == 1


def test_no_time_at_all_is_drawn() -> None:
    lanes = draw_timeline(
        simulate(get("gpipe")(2, 1, 3), Flow.chain(2), Costs.uniform(2, 0.0, 0.0)), width=10
    )
    assert lanes.count("|") == 4
    assert draw_timeline(Timeline.of(1, ()), width=10).startswith("rank 0 |          |")


def test_too_narrow_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10 characters, got 9"):
        draw_timeline(Timeline.of(1, ()), width=9)
