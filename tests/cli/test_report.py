"""What the user sees: the table of stages, lines in a file in place of the bar, and the last line."""

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from evenflow.cli.report import ProgressReport, Summary, Units, print_cut

UNITS = Units(item="tok", num_items_per_batch=2048, loss="nats/byte")


@dataclass(frozen=True, slots=True)
class Stage:
    stage: int = 1
    rank: int = 1
    num_nodes: int = 5
    first: str = "layers.2"
    last: str = "head"
    num_parameters: int = 1_234_567
    share: float = 0.516
    num_sent: int = 2
    sends_bytes: int = 98_304


def written(act, **options):
    file = io.StringIO()
    act(Console(file=file, width=90, **options))
    return file.getvalue()


def test_the_last_line_is_one_line_of_the_agreed_form():
    summary = Summary(
        first_loss=5.551,
        last_loss=1.5,
        validation_loss=1.6004,
        items_per_second=10240.0,
        step_seconds=0.2,
        bubble=0.2512,
    )
    assert summary.line(UNITS) == (
        "done: train loss 5.551 -> 1.500, validation 1.600 nats/byte, 10240 tok/s, step 200.0 ms, "
        "bubble 25.1 %"
    )


def test_a_long_line_is_not_broken():
    def act(console):
        with ProgressReport(console, num_steps=10, units=UNITS) as report:
            report.line("x" * 200 + " [not markup]")

    assert written(act) == "x" * 200 + " [not markup]\n"


def test_the_table_shows_each_stage():
    table = written(lambda console: print_cut(console, [Stage()]))
    for cell in ("1", "layers.2 … head", "5", "1,234,567", "51.6 %", "96.00 KiB in 2"):
        assert cell in table


def test_a_stage_that_sends_nothing_has_a_dash():
    table = written(lambda console: print_cut(console, [Stage(num_sent=0, sends_bytes=0)]))
    assert "96.00" not in table
    assert "│     - │" in table


@pytest.mark.parametrize(
    ("num_steps", "reported", "lines"),
    [
        (100, range(1, 101), [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (30, [1, 10, 20, 30], [1, 10, 20, 30]),
        (3, [1, 2, 3], [1, 2, 3]),
        (1000, [1, 10, *range(20, 1001, 10)], [1, *range(100, 1001, 100)]),
    ],
)
def test_in_a_file_there_are_about_ten_lines(num_steps, reported, lines):
    def act(console):
        with ProgressReport(console, num_steps=num_steps, units=UNITS) as report:
            for number in reported:
                report.step(number, loss=2.5, step_seconds=0.1)

    output = written(act).splitlines()
    assert output == [f"step {number}/{num_steps}  loss 2.500  20,480 tok/s  100 ms/step" for number in lines]


def test_on_a_terminal_the_bar_shows_the_numbers():
    def act(console):
        with ProgressReport(console, num_steps=4, units=UNITS) as report:
            report.step(3, loss=2.5, step_seconds=0.1)

    output = written(act, force_terminal=True)
    assert "loss 2.500  20,480 tok/s" in output
    assert "3/4" in output
    assert "step 3/4  loss" not in output


def test_the_other_ranks_are_silent():
    def act(console):
        print_cut(console, [Stage()])
        with ProgressReport(console, num_steps=1, units=UNITS) as report:
            report.step(1, loss=1.0, step_seconds=0.1)
            report.line("words")

    assert written(act, quiet=True) == ""
    assert written(act, quiet=True, force_terminal=True) == ""
