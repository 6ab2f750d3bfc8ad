"""`evenflow schedule`: what it prints and writes, and that every refusal is in words and writes nothing."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from evenflow.cli.main import main
from evenflow.cli.schedule import schedule
from evenflow.cli.schedule_flags import Flags
from evenflow.schedule_file import parse_schedule
from evenflow.schedules import catalog

SIZES = ("--ranks", "2", "--microbatches", "3")
OWN = "# placement: 0,1\n0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def shown(capsys, *arguments: object) -> str:
    """What a command that succeeds prints."""
    with pytest.raises(SystemExit) as exited:
        main(["schedule", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (exited.value.code, captured.err) == (0, "")
    return captured.out


def refused(capsys, *arguments: object) -> str:
    """The error text of a command that ends with exit code 2, having printed nothing else."""
    with pytest.raises(SystemExit) as exited:
        main(["schedule", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (exited.value.code, captured.out) == (2, "")
    return captured.err


# --- one schedule ----------------------------------------------------------------------------------------


def test_a_schedule_is_drawn_and_told(capsys) -> None:
    lines = shown(capsys, "1f1b", *SIZES, "--cap", "2", "--costs", "1,1,1,0.5").splitlines()
    assert lines[:6] == [
        "1f1b: 2 stages on 2 ranks, 3 microbatches",
        (
            "rank 0 |0fffff1ffff                  0bbbbbbbbbb2fffff1bbbbbbbbbb            2bbbbbbbbbb|"
            "  64 % busy"
        ),
        (
            "rank 1 |         0ffff0bbbbbbbbbbb1ffff1bbbbbbbbbbb      2ffff2bbbbbbbbbbb              |"
            "  64 % busy"
        ),
        "        0                                                                        14.00 s",
        "        f forward   b backward",
        "",
    ]
    # What the bounds are is theirs to test.
    bound = (
        r"14\.00 s, idle 35\.7 %, at least 1\d\.\d\d s \(because [^)]+\), "
        r"so within [\d.]+ % of the best for this placement"
    )
    assert re.fullmatch(rf"span {{10}}{bound}", lines[6])
    assert re.fullmatch(rf"makespan {{6}}{bound}", lines[7])
    assert lines[8:] == [
        "peak held     activations of 2, 1 microbatches (cap 2)",
        "transfers     6: 3 activations, 3 gradients; their bytes are not known",
        "critical path 12.00 s compute (rank 0 6.00 s, rank 1 6.00 s), 2.00 s in 4 transfers",
    ]


def test_what_cannot_be_beaten_is_called_optimal(capsys) -> None:
    out = shown(capsys, "gpipe", "--ranks", 1, "--microbatches", 2)
    assert "span          6.00 s, idle 0.0 %, at least 6.00 s (because rank 0" in out
    assert out.count("so optimal") == 2


def test_an_evaluation_has_no_bounds_and_no_cap(capsys) -> None:
    out = shown(capsys, "forward-only", *SIZES, "--cap", "1")
    assert "peak held     nothing: it keeps no activations" in out
    assert "at least" not in out


def test_measured_ranks_say_how_many_there_are_and_what_they_hold(capsys, folder: Path) -> None:
    (folder / "times.csv").write_text(
        "rank,forward_ms,input_grad_ms,weight_grad_ms,activation_gib,cap_gib\n0,1,1,1,2,6\n1,1,1,1,1,6\n"
    )
    out = shown(capsys, "gpipe", "--microbatches", 3, "--costs", "times.csv", "--latency", "0.0005")
    assert "span          13.00 ms" in out
    assert "activations of 3 microbatches (cap 3, 6), 6, 3 GiB (cap 6)" in out


def test_measured_layers_are_cut_into_stages(capsys, folder: Path) -> None:
    rows = "".join(f"layer {at},1,1,1,8\n" for at in range(6))
    (folder / "times.csv").write_text(f"layer,forward_ms,input_grad_ms,weight_grad_ms,output_mib\n{rows}")
    out = shown(capsys, "gpipe", *SIZES, "--stages-per-rank", 2, "--costs", "times.csv", "--latency", "0.001")
    assert "4 stages on 2 ranks" in out
    assert "transfers     18: 9 activations, 9 gradients; 144.00 MiB" in out


def test_a_long_schedule_does_not_flood_the_terminal(capsys) -> None:
    lines = shown(capsys, "gpipe", "--ranks", 40, "--microbatches", 100).splitlines()
    assert len(lines) < 40
    assert max(len(line) for line in lines if line.startswith("rank")) == 100
    assert "16 ranks between are not drawn" in "\n".join(lines)


@pytest.mark.parametrize("name", catalog.SCHEDULES)
def test_every_method_of_the_catalog_is_shown(capsys, name: str) -> None:
    assert f"{name}: " in shown(capsys, name, "--ranks", 4, "--microbatches", 8)


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_is_shown(capsys, folder: Path) -> None:
    (folder / "mine.csv").write_text(OWN)
    lines = shown(capsys, "--file", "mine.csv").splitlines()
    assert lines[0] == "mine: 2 stages on 2 ranks, 2 microbatches"
    assert lines[4] == "        f forward   i input gradient   w weight gradient"


def test_what_is_no_file_is_not_replaced_by_one(capsys, folder: Path) -> None:
    os.mkfifo("pipe")
    for option in ("--save", "--draw"):
        error = refused(capsys, "gpipe", *SIZES, option, "pipe")
        assert f"{option} pipe is no regular file" in error
    assert Path("pipe").is_fifo()


def test_what_is_saved_can_be_given_back(capsys, folder: Path) -> None:
    out = shown(capsys, "zb-h1", *SIZES, "--save", "mine.csv")
    assert out.splitlines()[-1] == "saved to mine.csv"
    again = shown(capsys, "--file", "mine.csv")
    assert again.splitlines() == out.splitlines()[:-1]
    assert parse_schedule((folder / "mine.csv").read_text(), name="").name == "zb-h1"


@pytest.mark.parametrize(("name", "begins"), [("out.svg", b"<?xml"), ("out.png", b"\x89PNG")])
def test_a_picture_is_drawn_over_an_old_one(capsys, folder: Path, name: str, begins: bytes) -> None:
    (folder / name).write_text("old")
    assert shown(capsys, "gpipe", *SIZES, "--draw", name).splitlines()[-1] == f"drawn to {name}"
    assert (folder / name).read_bytes().startswith(begins)


# --- comparison ------------------------------------------------------------------------------------------


def rows_of(out: str) -> list[list[str]]:
    table = out.partition("───\n")[2] or out.partition("─ \n")[2]
    return [line.split() for line in table.partition("peak held:")[0].splitlines() if line.strip()]


def test_methods_are_compared_from_the_shortest_span_on(capsys) -> None:
    out = shown(capsys, "--compare", "--ranks", 4, "--microbatches", 8, "--cap", 4)
    rows = rows_of(out)
    names = [row[0] for row in rows]
    assert {*names, "forward-only"} >= set(catalog.SCHEDULES) - {"forward-only"}
    assert names.index("zb-h1") < names.index("1f1b") < names.index("sequential") < names.index("gpipe")
    (gpipe,) = [row for row in rows if row[0] == "gpipe"]
    assert gpipe == ["gpipe", "1", "33.00", "27.3", "%", "33.00", "27.3", "%", "8", "over", "48"]
    assert "forward-only: it evaluates, and does not train" in out
    fits = [row[-2] for row in rows]
    assert fits == sorted(fits)
    for group in ("fits", "over"):
        spans = [float(row[2]) for row in rows if row[-2] == group]
        assert spans == sorted(spans)


def test_what_cannot_serve_the_sizes_says_why_in_a_line(capsys) -> None:
    out = shown(capsys, "--compare", *SIZES, "--stages-per-rank", 3)
    assert re.search(r"^1f1b: needs as many stages as ranks, got 6 stages on 2 ranks", out, re.MULTILINE)
    assert "1f1b" not in [row[0] for row in rows_of(out)]


def test_ones_own_schedule_is_compared_with_the_methods(capsys, folder: Path) -> None:
    (folder / "mine.csv").write_text(OWN)
    rows = rows_of(shown(capsys, "--compare", "--file", "mine.csv"))
    assert {"mine", "gpipe", "1f1b"} <= {row[0] for row in rows}


# --- refusals --------------------------------------------------------------------------------------------


def spelled_out(arguments: str) -> str:
    return arguments.replace("2 2", "--ranks 2 --microbatches 2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "error: no schedule is given: name one (sequential, gpipe, "),
        (
            "gpip --ranks 2 --microbatches 2",
            "no schedule 'gpip'; did you mean 'gpipe'?\nThere are: sequential",
        ),
        (
            "gpipe",
            "--ranks is missing: say how many ranks there are\n--microbatches is missing: say into how",
        ),
        (
            "gpipe --ranks 0 --microbatches -1",
            "--ranks 0 must be at least 1\n--microbatches -1 must be at least",
        ),
        ("gpipe 2 2 --stages-per-rank 0", "--stages-per-rank 0 must be at least 1"),
        ("gpipe --ranks 4000 --microbatches 9999", "119,988,000 ops, more than the 5,000,000"),
        (
            "1f1b --ranks 2 --microbatches 2 --stages-per-rank 2",
            "needs as many stages as ranks, got 4 stages",
        ),
        ("gpipe 2 2 --costs 1,1,-1", "--costs 1,1,-1: -1 must be finite and at least 0"),
        ("gpipe 2 2 --costs 1,1,nan", "nan must be finite and at least 0"),
        ("gpipe 2 2 --costs 1,1,x", "--costs 1,1,x: 'x' is no number; write a rank's"),
        ("gpipe 2 2 --costs 1,1", "--costs 1,1 has 2 numbers: write a rank's seconds"),
        ("gpipe 2 2 --costs x", "--costs x: there is no such file, and it is no number"),
        ("gpipe 2 2 --costs x.csv", "cannot read the costs x.csv: No such file"),
        ("gpipe 2 2 --costs 1,1,1,1 --latency 1", "are the same thing: leave one out"),
        ("gpipe 2 2 --latency -1", "--latency -1 must be finite and at least 0 seconds"),
        ("gpipe 2 2 --cap 0", "--cap 0 must be finite and above 0"),
        ("gpipe 2 2 --cap inf", "--cap inf must be finite and above 0"),
        ("gpipe --ranks 3 --microbatches 2 --costs times.csv", "the costs name 2 ranks, and there are 3"),
        (
            "gpipe --microbatches 2 --costs times.csv --cap 2",
            "--cap 2 and the column cap of times.csv contradict",
        ),
        ("--file none.csv", "cannot read the schedule none.csv: No such file or directory"),
        ("--file times.csv", "cannot read the schedule times.csv: 18 faults:\n  - line 1, column 1: 'rank'"),
        ("gpipe --file own.csv", "two schedules are given, 'gpipe' and --file own.csv: leave one out"),
        ("--file own.csv --ranks 2", "--ranks is what --file own.csv says: leave --ranks out"),
        (
            "--compare gpipe --ranks 2 --microbatches 2",
            "--compare tabulates all methods, and the name 'gpipe'",
        ),
        ("--compare --draw x.svg --ranks 2 --microbatches 2", "and --draw is for one: leave one of them out"),
        ("gpipe 2 2 --draw x.jpg", "cannot draw x.jpg: end its name in .svg, .png, .pdf"),
        ("gpipe 2 2 --draw no/x.svg", "--draw no/x.svg: there is no folder no"),
        ("gpipe 2 2 --save .", "--save . is a folder: name a file in it"),
        ("gpipe 2 2 --save own.csv", "--save own.csv: it exists, perhaps edited by hand"),
        ("gpipe 2 2 --draw a.svg --save a.svg", "--draw and --save both name a.svg"),
    ],
)
def test_a_wrong_command_is_refused_in_words(capsys, folder: Path, arguments: str, message: str) -> None:
    (folder / "own.csv").write_text(OWN)
    (folder / "times.csv").write_text(
        "rank,forward,input_grad,weight_grad,activation,cap\n0,1,1,1,1,3\n1,1,1,1,1,3\n"
    )
    assert message in refused(capsys, *spelled_out(arguments).split())
    assert {path.name for path in folder.iterdir()} == {"own.csv", "times.csv"}
    assert (folder / "own.csv").read_text() == OWN


def test_over_the_cap_each_rank_and_its_op_are_told(capsys, folder: Path) -> None:
    error = refused(capsys, "gpipe", *SIZES, "--cap", 2, "--draw", "out.svg", "--save", "out.csv")
    assert error.startswith("error: schedule 'gpipe' has 2 faults:\n")
    assert "rank 0 holds 3 in 0F2, over its cap of 2 (its peak is 3, in 0F2)" in error
    assert "rank 1 holds 3 in 1F2, over its cap of 2" in error
    assert "evenflow schedule --compare tells which" in error
    assert list(folder.iterdir()) == []


def test_a_schedule_that_cannot_run_is_refused(capsys, folder: Path) -> None:
    (folder / "mine.csv").write_text("0F0,0B0,0F1,0B1\n1B0,1F0,1F1,1B1\n")
    error = refused(capsys, "--file", "mine.csv")
    assert "standstill: rank 1 stands before 1B0, which waits for 1F0 on rank 1" in error


def test_a_file_that_cannot_be_written_is_told(capsys, folder: Path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as exited:
        main(["schedule", "gpipe", *SIZES, "--save", "out.csv"])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: cannot write out.csv: No space left on device; name another file\n"


def test_it_starts_without_torch_and_matplotlib() -> None:
    code = (
        "import sys\nfrom evenflow.cli.main import main\n"
        "try: main('schedule gpipe --ranks 2 --microbatches 2'.split())\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print(sorted({'torch', 'numba', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "[]"


# --- the search ------------------------------------------------------------------------------------------

SEARCHED = ("auto", "--ranks", 3, "--microbatches", 5, "--latency", 0.3, "--cap", 2, "--budget", 0.02)


def measured(out: str, name: str) -> tuple[float, float, str]:
    """The seconds of the span or the makespan, those of its bound, and the end of the line."""
    line = rf"^{name} +([\d.]+) s, .* at least ([\d.]+) s \(.*\), so (.*) for this placement$"
    found = re.search(line, out, re.MULTILINE)
    assert found, out
    return float(found[1]), float(found[2]), found[3]


@pytest.mark.parametrize("objective", ["span", "makespan"])
def test_auto_tells_how_far_from_optimal_it_is(capsys, objective: str) -> None:
    out = shown(capsys, *SEARCHED, "--objective", objective)
    assert out.startswith("auto: 6 stages on 3 ranks, 5 microbatches\n")
    seconds, bound, verdict = measured(out, objective)
    assert 15.0 < bound <= seconds
    assert verdict == "optimal" if seconds == bound else re.fullmatch(r"within [\d.]+ % of the best", verdict)
    assert "activations of 2 microbatches (cap 2)" in out


def test_auto_says_which_method_cannot_be_beaten(capsys) -> None:
    out = shown(capsys, "auto", "--ranks", 2, "--microbatches", 4)
    assert out.startswith("auto (zb-v): 4 stages on 2 ranks, 4 microbatches\n")
    assert measured(out, "makespan")[2] == "optimal"


def test_auto_prints_the_same_every_time(capsys, folder: Path) -> None:
    first = shown(capsys, *SEARCHED, "--seed", 7, "--save", "first.csv")
    assert shown(capsys, *SEARCHED, "--seed", 7, "--save", "again.csv") == first.replace("first", "again")
    assert (folder / "first.csv").read_text() == (folder / "again.csv").read_text()
    shown(capsys, *SEARCHED, "--seed", 8, "--save", "other.csv")
    assert (folder / "first.csv").read_text() != (folder / "other.csv").read_text()
    assert parse_schedule((folder / "first.csv").read_text(), name="").name == "auto"


def test_auto_makes_short_what_it_is_told_to(capsys) -> None:
    arguments = ("auto", "--ranks", 4, "--microbatches", 8, "--latency", 0.2, "--cap", 4, "--budget", 0.1)
    by_span = shown(capsys, *arguments, "--objective", "span")
    by_makespan = shown(capsys, *arguments, "--objective", "makespan")
    assert shown(capsys, *arguments) == by_makespan
    assert measured(by_span, "span")[0] < measured(by_makespan, "span")[0]
    assert measured(by_makespan, "makespan")[0] < measured(by_span, "makespan")[0]


def test_a_longer_search_finds_no_worse(capsys) -> None:
    arguments = (
        "auto",
        "--ranks",
        4,
        "--microbatches",
        8,
        "--latency",
        0.2,
        "--cap",
        3,
        "--costs",
        "1,1.2,0.7",
    )
    short, long = (shown(capsys, *arguments, "--budget", budget) for budget in (0.0001, 0.5))
    assert measured(long, "makespan")[0] < measured(short, "makespan")[0]


def test_auto_searches_for_measured_ranks(capsys, folder: Path) -> None:
    (folder / "times.csv").write_text(
        "rank,forward_ms,input_grad_ms,weight_grad_ms,activation_gib,cap_gib\n0,1,2,1,2,6\n1,2,1,1,1,6\n"
    )
    out = shown(capsys, "auto", "--microbatches", 5, "--costs", "times.csv", "--budget", 0.02)
    assert "on 2 ranks, 5 microbatches" in out
    assert "optimal" in out


def test_a_comparison_leaves_auto_out(capsys) -> None:
    out = shown(capsys, "--compare", *SIZES)
    assert "auto: it searches, for some time: evenflow schedule auto" in out.splitlines()
    assert "auto" not in [row[0] for row in rows_of(out)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "gpipe 2 2 --budget 5",
            "--budget is for the search: name the schedule 'auto', or leave --budget out",
        ),
        ("gpipe 2 2 --seed 0", "--seed is for the search: name the schedule 'auto', or leave --seed out"),
        ("gpipe 2 2 --objective span", "--objective is for the search: name the schedule 'auto', or leave"),
        ("--file own.csv --seed 1", "--seed is for the search"),
        ("--compare 2 2 --budget 1", "--budget is for the search"),
        ("auto 2 2 --budget 0", "--budget 0 must be finite and above 0 seconds"),
        ("auto 2 2 --budget -1", "--budget -1 must be finite and above 0 seconds"),
        ("auto 2 2 --budget inf", "--budget inf must be finite and above 0 seconds"),
        ("auto 2 2 --budget nan", "--budget nan must be finite and above 0 seconds"),
        ("auto 2 2 --objective time", "'time' is not one of 'span'"),
        ("auto 2 2 --cap 0.5", "rank 1 has a cap of 0.5 and needs 1.0 for one microbatch: raise the cap"),
        ("auto", "--ranks is missing: say how many ranks there are\n--microbatches is missing"),
        ("auto --ranks 0 --microbatches 4", "--ranks 0 must be at least 1"),
        ("auto 2 2 --file own.csv", "two schedules are given, 'auto' and --file own.csv"),
        ("autoo 2 2", "no schedule 'autoo'; did you mean 'auto'?"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_words(
    capsys, folder: Path, arguments: str, message: str
) -> None:
    (folder / "own.csv").write_text(OWN)
    assert message in refused(capsys, *spelled_out(arguments).split())


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_cuts_no_number_off_the_comparison(columns: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=columns, force_terminal=True, color_system=None)
    schedule(Flags(compare=True, num_ranks=4, num_microbatches=8), console)
    assert re.search(r"1f1b +1 +33\.00 +27\.3 % +33\.00 +27\.3 % +4 +48", screen.getvalue())


@pytest.mark.parametrize("flags", ["--costs 1e200,1,1", "--cap 1e200", "--latency 1e200"])
def test_absurd_numbers_are_refused(capsys, flags: str) -> None:
    out = refused(capsys, "auto", "--ranks", 2, "--microbatches", 2, *flags.split())
    assert "1e+100" in out
