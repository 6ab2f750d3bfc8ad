"""What the user sees of a run: the table of stages, and the last line."""

import io
from dataclasses import dataclass

from rich.console import Console

from evenflow.cli.report import Summary, Units, print_cut

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
