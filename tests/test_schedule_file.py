"""Schedule files: what is written is read again, and every fault is told with its place."""

from pathlib import Path

import pytest
from hypothesis import given, settings

from evenflow.errors import ConfigError
from evenflow.ir import Forward, Placement, Schedule
from evenflow.schedule_file import format_schedule, parse_schedule, read_schedule_file
from evenflow.schedules.catalog import get
from random_pipelines import Pipeline, pipelines


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_what_is_written_is_read_again(pipeline: Pipeline) -> None:
    assert parse_schedule(format_schedule(pipeline.schedule), name="other") == pipeline.schedule


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_the_placement_can_be_left_out(pipeline: Pipeline) -> None:
    text = "\n".join(line for line in format_schedule(pipeline.schedule).splitlines() if line[0] != "#")
    read = parse_schedule(text, name=pipeline.schedule.name)
    assert read == pipeline.schedule


def test_what_a_spreadsheet_makes_of_it_is_read() -> None:
    text = (
        '\ufeff"# name: a, b",,,\r\n'
        '"# placement: 0,1,1,0",,,\r\n'
        "# a remark: of no consequence\r\n"
        ",,,\r\n"
        '0F0, ,"3F0&0F1",3B0 ,0B0\r\n'
        ",1F0,2F0,,\r\n"
        "\r\n"
    )
    schedule = parse_schedule(text, name="other")
    assert schedule.name == "a, b"
    assert schedule.placement == Placement((0, 1, 1, 0))
    assert [str(op) for op in schedule.ranks[0]] == ["0F0", "3F0&0F1", "3B0", "0B0"]
    assert [str(op) for op in schedule.ranks[1]] == ["1F0", "2F0"]
    assert schedule.num_microbatches == 2


def test_the_name_and_the_number_of_microbatches_are_found() -> None:
    schedule = parse_schedule("0F0,0F1,0F2", name="mine")
    assert (schedule.name, schedule.num_microbatches) == ("mine", 3)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["no row holds an op: write a line for each rank, such as '0F0,0F1,0B0,0B1'"]),
        (",,\n# a remark\n", ["no row holds an op: write a line for each rank, such as '0F0,0F1,0B0,0B1'"]),
        (
            "# placment: 0,1\n# placement: 0,x\n0F0,0C0,S0>1F0,\n1F0,G1",
            [
                "line 1: 'placment' is no key; did you mean '# placement: ...'?",
                "line 2: '0,x' is no placement: write the rank of each stage, '0,1,1,0'",
                (
                    "line 3, column 2: '0C0' is not a compute op: write stage, one of F, B, I and "
                    "W, microbatch "
                    "('2F0'), or two fused ('2F3&5B1')"
                ),
                "line 3, column 3: 'S0>1F0' is added by Evenflow, and no part of a schedule: leave it out",
                "line 4, column 2: 'G1' is added by Evenflow, and no part of a schedule: leave it out",
            ],
        ),
        (
            "# placement: 0,2\n0F0",
            [
                (
                    "line 1: rank_of (0, 2) must use every rank from 0 to 2, and no other: number "
                    "the ranks so "
                    "that each holds a stage"
                )
            ],
        ),
        (
            "# placement: 0,1\n0F0,1F0\n2F0\n0F0",
            [
                "the placement of line 1 names 2 ranks, and there are 3 rows: write a row for each rank",
                (
                    "line 2, column 2: 1F0 stands in the row of rank 0, and stage 1 lives on rank 1: move "
                    "it there"
                ),
                (
                    "line 3, column 1: 2F0 is of stage 2, and the placement names stages 0..1: add "
                    "its rank in "
                    "line 1"
                ),
                (
                    "line 4, column 1: 0F0 stands in the row of rank 2, and stage 0 lives on rank 0: move "
                    "it there"
                ),
            ],
        ),
        (
            "0F0,0B0\n1F0,,0F2,3F0",
            [
                (
                    "line 2, column 3: 0F2 stands in the row of rank 1, and stage 0 is on rank 0 "
                    "since line 1, "
                    "column 1: keep a stage in one row"
                ),
                "no row holds an op of stage 2, and there is one of stage 3: count stages from 0",
            ],
        ),
        (
            "0F0,0F2\n1F0,1F5",
            [
                (
                    "line 2, column 2: 1F5 is of microbatch 5, and no op is of microbatch 1: count "
                    "microbatches "
                    "from 0"
                )
            ],
        ),
    ],
)
def test_all_faults_are_told_with_their_places(text: str, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_schedule(text, name="mine")
    head, *told = str(raised.value).splitlines()
    assert told == [f"  - {fault}" for fault in faults]
    assert head == f"{len(faults)} fault{'s' if len(faults) > 1 else ''}:"


@pytest.mark.parametrize("op", ["9" * 30 + "F0", "0F" + "9" * 30, "9" * 5000 + "F0"])
def test_a_huge_number_is_refused_at_once(op: str) -> None:
    with pytest.raises(ConfigError, match="1 fault"):
        parse_schedule(f"0F0,{op}", name="mine")


def test_of_very_many_faults_the_first_are_told() -> None:
    with pytest.raises(ConfigError, match=r"100 faults:[^$]*and 80 more$"):
        parse_schedule(",".join(["x"] * 100), name="mine")


@pytest.mark.parametrize("name", ["", " mine", "mine\n", "a\nb", "a\x0bb"])
def test_a_name_that_cannot_be_read_again_is_not_written(name: str) -> None:
    with pytest.raises(ConfigError, match="must be one line without spaces around it"):
        format_schedule(Schedule(name, Placement.linear(1), 1, ((Forward(0, 0),),)))


def test_a_file_is_named_after_itself_and_where_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0")
    assert read_schedule_file(path).name == "mine"
    path.write_text("0F0,0C0")
    with pytest.raises(
        ConfigError, match=r"cannot read the schedule .*mine.csv: 1 fault:\n  - line 1, column 2"
    ):
        read_schedule_file(path)


@pytest.mark.parametrize("name", ["\x1b[31mred", "x" * 201])
def test_a_name_that_no_terminal_can_show_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name: write up to 200 printable letters"):
        parse_schedule(f"# name: {name}\n0F0,0B0", name="mine")


def test_a_long_schedule_is_read_in_time() -> None:
    schedule = get("gpipe")(16, 4, 128)
    assert parse_schedule(format_schedule(schedule), name="") == schedule
