"""Terminal drawings: golden ones, and that they keep to their width."""

import pytest
from rich.console import Console

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Costs, Flow, Forward, InputGrad, Overlap, Span, Timeline, WeightGrad
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.view.terminal import lanes_text


def drawn(timeline: Timeline, width: int = 60, **options: int) -> list[str]:
    return lanes_text(timeline, width=width, **options).plain.splitlines()


def timeline_of(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Timeline:
    schedule = get(name)(num_ranks, stages_per_rank, num_microbatches)
    num_stages = schedule.placement.num_stages
    return simulate(schedule, Flow.chain(num_stages), Costs.uniform(num_stages))


def test_every_kind_has_its_letter() -> None:
    spans = [
        Span(0, Forward(0, 0), 5.0, 6.0),
        Span(0, Overlap(Forward(0, 1), InputGrad(0, 0)), 6.0, 9.0),
        Span(0, WeightGrad(0, 0), 9.0, 10.0),
        Span(0, Backward(0, 1), 12.0, 15.0),
    ]
    assert drawn(Timeline.of(1, spans)) == [
        "rank 0 |0fff0F1&0I0xxxxx0www        1bbbbbbbbbbb|  80 % busy",
        "        0                                10.00 s",
        "        f forward   b backward   w weight gradient   x overlap",
    ]


def test_several_stages_are_told_apart_where_there_is_room() -> None:
    assert drawn(timeline_of("gpipe", 2, 2, 2), width=104)[:2] == [
        (
            "rank 0 |0F0fff0F1ff2F0fff2F1ff                 2B0bbbbbbbb2B1bbbbbbbbb0B0bbbbbbbb0B1bbbbbbbb|"
            "  80 % busy"
        ),
        (
            "rank 1 |      1F0ff1F1fff3F0ff3F1fff3B0bbbbbbbb3B1bbbbbbbb1B0bbbbbbbbb1B1bbbbbbbb           |"
            "  80 % busy"
        ),
    ]
    assert drawn(timeline_of("gpipe", 2, 2, 2), width=64)[:2] == [
        "rank 0 |0ff1ff0ff1ff         2B0bb2B1bbb0B0bbb0B1bbb|  80 % busy",
        "rank 1 |   0ff1ff0ff1ff3B0bbb3B1bb1B0bbb1B1bbb      |  80 % busy",
    ]


def test_narrow_ops_show_what_ran_most() -> None:
    spans = [Span(0, Forward(0, at), at * 0.1, at * 0.1 + 0.1) for at in range(200)]
    spans += [Span(0, Backward(0, at), 20 + at * 0.2, 20.1 + at * 0.2) for at in range(100)]
    lane, *_, note = drawn(Timeline.of(1, spans))
    assert set(lane.partition("|")[2].partition("|")[0]) <= {"f", "b", " "}
    assert lane.count("f") == pytest.approx(20, abs=2)
    assert note.endswith("what ran most of it")


def test_idleness_that_is_most_of_a_column_is_blank() -> None:
    spans = [Span(0, Forward(0, at), at * 1.0, at * 1.0 + 0.3) for at in range(400)]
    assert drawn(Timeline.of(1, spans))[0].partition("|")[2].partition("|")[0].strip() == ""


@pytest.mark.parametrize("width", [40, 61, 100, 200])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (12, 40)])
def test_lanes_keep_to_the_width(width: int, num_ranks: int, num_microbatches: int) -> None:
    lines = drawn(timeline_of("1f1b", num_ranks, 1, num_microbatches), width=width)
    assert {len(line) for line in lines if line.startswith("rank")} == {width}


def test_of_many_ranks_the_first_and_the_last_are_drawn() -> None:
    lines = drawn(timeline_of("gpipe", 9, 1, 4), width=80, max_ranks=5)
    assert [line[:6] for line in lines[:6]] == ["rank 0", "rank 1", "rank 2", "     …", "rank 7", "rank 8"]
    assert lines[3].endswith("4 ranks between are not drawn")


def test_no_time_at_all_is_drawn() -> None:
    schedule = get("gpipe")(2, 1, 2)
    lines = drawn(simulate(schedule, Flow.chain(2), Costs.uniform(2, 0.0, 0.0, 0.0)))
    assert lines[0].endswith("|   0 % busy")
    assert drawn(Timeline.of(1, []))[0].partition("|")[2].strip().endswith("0 % busy")


def test_colours_stand_behind_the_letters_on_a_terminal() -> None:
    console = Console(force_terminal=True, color_system="truecolor", width=60)
    with console.capture() as capture:
        console.print(lanes_text(timeline_of("gpipe", 1, 1, 2), width=60))
    assert "\x1b[38;2;33;33;33;48;2;" in capture.get()


def test_too_narrow_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 40 characters, got 39"):
        drawn(Timeline.of(1, []), width=39)
