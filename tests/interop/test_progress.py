"""Progress: a bar with numbers below it on a terminal, lines in a file, no word on other ranks."""

import io
import re

import pytest
from rich.console import Console

import evenflow
from evenflow.interop.progress import ProgressReport
from unsplit import mean_square, mlp, regression, sgd

GIB = 2**30
ONE = {"loss": 2.5, "step_seconds": 0.1, "rows_per_second": 160.0, "tokens_per_second": 20480.0}
RANKS = {
    **ONE,
    "bubble": 0.2125,
    "bubble/rank0": 0.1,
    "bubble/rank1": 0.325,
    "peak_bytes/rank0": 30 * GIB,
    "cap_bytes/rank0": 80 * GIB,
    "peak_bytes/rank1": 20 * GIB,
    "cap_bytes/rank1": 24 * GIB,
}


def shown(act, *, num_steps=1200, num_made=0, width=90, **options):
    file = io.StringIO()
    console = Console(file=file, width=width, **options)
    with ProgressReport(console, num_steps=num_steps, num_made=num_made) as report:
        act(report)
    return file.getvalue()


def on_a_terminal(act, **options):
    """The last picture of the bar and its numbers, line by line, without what moves the cursor."""
    drawn = shown(act, force_terminal=True, color_system=None, **options)
    last = drawn.rpartition("\x1b[2K")[2]
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", last).splitlines()


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            60,
            [
                "loss 2.500  20,480 tokens/s  100 ms/step  bubble 21.2 %",
                "memory 20.00 GiB of 24.00 GiB (rank 1)",
            ],
        ),
        (
            120,
            [
                (
                    "loss 2.500  20,480 tokens/s  100 ms/step  bubble 21.2 %  "
                    "memory 20.00 GiB of 24.00 GiB (rank 1)"
                )
            ],
        ),
    ],
)
def test_on_a_terminal_a_bar_stands_above_the_numbers(width, lines):
    first, *rest = on_a_terminal(lambda report: report(300, RANKS), width=width)
    assert rest == lines
    assert len(first) == width
    bar = re.fullmatch(r"step 300/1200 (━+╸?) +ETA 0:01:30", first)[1]
    assert len(bar) == pytest.approx((width - len("step 300/1200  ETA 0:01:30")) / 4, abs=1)


def test_the_bar_does_not_grow_past_its_end():
    first, *_ = on_a_terminal(lambda report: report(1300, ONE), width=60)
    assert "ETA 0:00:00" in first


def test_a_run_that_goes_on_stands_where_it_was():
    assert on_a_terminal(lambda report: None, num_made=600)[0].startswith("step 600/1200 ━")
    assert shown(lambda report: None, num_made=600) == ""


def test_the_end_is_shown_though_the_last_steps_have_no_numbers():
    def act(report):
        report(90, ONE)
        report.reached(100)

    first, *rest = on_a_terminal(act, num_steps=100)
    assert re.fullmatch(r"step 100/100 ━+ +ETA 0:00:00", first)
    assert rest == ["loss 2.500  20,480 tokens/s  100 ms/step"]
    assert shown(act, num_steps=100).splitlines()[1:] == ["step 100/100"]


def test_a_time_left_that_no_clock_shows_is_left_out():
    (line,) = shown(lambda report: report(1, ONE), num_steps=10**15).splitlines()
    assert line == f"step 1/{10**15}  loss 2.500  20,480 tokens/s  100 ms/step"


def test_a_step_without_times_keeps_the_time_left():
    def act(report):
        report(1, ONE)
        report(2, {"loss": 2.25})

    assert shown(act, num_steps=10).splitlines()[1] == "step 2/10  loss 2.250  ETA 0:00:01"


def test_a_quick_loop_is_drawn_now_and_then():
    def act(report):
        for number in range(1, 1201):
            report(number, ONE)

    drawn = shown(act, force_terminal=True)
    assert drawn.count("loss 2.500") < 100
    assert "step 1200/1200" in drawn  # the end always is


@pytest.mark.parametrize(
    ("num_steps", "told", "lines"),
    [
        (100, range(1, 101), [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (30, [1, 10, 20, 30], [1, 10, 20, 30]),
        (3, [1, 2, 3], [1, 2, 3]),
        (1000, [1, 10, *range(20, 1001, 10)], [1, *range(100, 1001, 100)]),
    ],
)
def test_in_a_file_there_are_about_ten_lines(num_steps, told, lines):
    def act(report):
        for number in told:
            report(number, ONE)

    found = [line.rpartition("  ETA ")[0] for line in shown(act, num_steps=num_steps).splitlines()]
    assert found == [
        f"step {number}/{num_steps}  loss 2.500  20,480 tokens/s  100 ms/step" for number in lines
    ]


def test_a_long_line_is_not_broken():
    assert shown(lambda report: report.line("x" * 200 + " [not markup]")) == "x" * 200 + " [not markup]\n"


def test_what_is_not_known_is_left_out():
    rank0 = {**ONE, "step_seconds": 0.0025, "bubble/rank0": 0.125, "peak_bytes/rank0": 3 * 2**20}
    (line,) = shown(lambda report: report(1, rank0), num_steps=2).splitlines()
    assert line == (
        "step 1/2  loss 2.500  20,480 tokens/s  2.5 ms/step  bubble 12.5 % (rank 0)  "
        "memory 3.00 MiB (rank 0)  ETA 0:00:00"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_the_other_ranks_are_silent(terminal):
    def act(report):
        report(1, RANKS)
        report.line("words")

    assert shown(act, quiet=True, force_terminal=terminal) == ""


def test_a_training_loop_shows_its_progress_for_as_long_as_it_is_asked():
    file = io.StringIO()
    pipe = evenflow.pipeline(mlp(4, 8, 1), loss=mean_square, example=regression(), optimizer=sgd, stages=2)
    with evenflow.progress(pipe, num_steps=4, every=2, console=Console(file=file, width=90)) as report:
        for batch in pipe.feed([regression()] * 4):
            pipe.step(batch)
        report.line("the end")
    assert (pipe._logs._hooks, pipe._logs._asks) == ([], [])  # nobody asks any more
    pipe.step(regression())
    lines = file.getvalue().splitlines()
    pattern = (
        r"step (\d)/4  loss \d\.\d{3}  [\d,]+ rows/s  [\d.]+ ms/step  bubble \d+\.\d %  "
        r"memory \d+\.\d\d [MG]iB \(rank 0\)  ETA 0:00:00"
    )
    assert [re.fullmatch(pattern, line)[1] for line in lines[:-1]] == ["1", "2", "4"]
    assert lines[-1] == "the end"
