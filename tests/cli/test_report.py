"""What the user sees of a run: the table of stages, and the last line."""

import io
import math
from dataclasses import dataclass

from rich.console import Console

from evenflow.cli.report import last_line, print_cut
from small_runs import RUN, STEPS


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
    assert last_line(RUN, STEPS, 1.6004, "nats/byte") == (
        "done: train loss -1.250 -> -1.250, validation 1.600 nats/byte, 1000 tok/s, step 200.0 ms, "
        "bubble 22.5 %"
    )


def test_a_run_without_a_finite_loss_has_a_last_line_too():
    assert "train loss nan -> nan" in last_line(RUN, STEPS[1:], math.nan, "nats/byte")


def test_the_table_shows_each_stage():
    table = written(lambda console: print_cut(console, [Stage()]))
    for cell in ("1", "layers.2 … head", "5", "1,234,567", "51.6 %", "96.00 KiB in 2"):
        assert cell in table


def test_a_stage_that_sends_nothing_has_a_dash():
    table = written(lambda console: print_cut(console, [Stage(num_sent=0, sends_bytes=0)]))
    assert "96.00" not in table
    assert "│     - │" in table


def test_the_other_ranks_are_silent():
    assert written(lambda console: print_cut(console, [Stage()]), quiet=True) == ""
