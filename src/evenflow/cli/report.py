"""What the user sees of a run before and after it trains: the cut, what was checked, its last line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.view.units import format_bytes

_MAX_WIDTH = 200


@dataclass(frozen=True, slots=True)
class Units:
    """What this run counts and in what it measures: `tok` and `nats/byte` for text."""

    item: str
    num_items_per_batch: int
    loss: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished run. The losses are in the units that the line names; `bubble` is a share, 0 to 1."""

    first_loss: float
    last_loss: float
    validation_loss: float
    items_per_second: float
    step_seconds: float
    bubble: float

    def line(self, units: Units) -> str:
        """The last line of the output.

        Example:
            >>> line = Summary(5.55, 1.5, 1.6, 10240.0, 0.2, 0.25).line(Units("tok", 2048, "nats/byte"))
            >>> line.startswith("done: train loss 5.550 -> 1.500, validation 1.600 nats/byte, 10240 tok/s, ")
            True
        """
        return (
            f"done: train loss {self.first_loss:.3f} -> {self.last_loss:.3f}, "
            f"validation {self.validation_loss:.3f} {units.loss}, "
            f"{self.items_per_second:.0f} {units.item}/s, "
            f"step {1000 * self.step_seconds:.1f} ms, bubble {100 * self.bubble:.1f} %"
        )


class CutStage(Protocol):
    """What the table needs to know of a stage of the cut model."""

    @property
    def stage(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def first(self) -> str: ...
    @property
    def last(self) -> str: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def num_sent(self) -> int: ...
    @property
    def sends_bytes(self) -> int: ...


class ComparisonReport(Protocol):
    """What the table of a check needs to know: `evenflow.pipe.check_report.CheckReport` knows it."""

    @property
    def title(self) -> str: ...
    @property
    def headings(self) -> tuple[str, ...]: ...
    @property
    def table(self) -> list[tuple[str, ...]]: ...
    @property
    def verdict(self) -> str: ...
    @property
    def equal(self) -> bool: ...


def print_cut(console: Console, cut: Iterable[CutStage]) -> None:
    """Show each stage: its rank, nodes, parameters, estimated share of the work, and what it sends.

    What it sends are the activations that leave it for each microbatch: tensors, and bytes in all.
    """
    title = "The model, cut into stages (sends: per microbatch, bytes in how many tensors)"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table()
    for heading in ("stage", "rank"):
        table.add_column(heading, justify="right")
    table.add_column("from … to", overflow="fold")
    for heading in ("nodes", "parameters", "share of work", "sends"):
        table.add_column(heading, justify="right")
    for stage in cut:
        table.add_row(
            str(stage.stage),
            str(stage.rank),
            f"{stage.first} … {stage.last}",
            str(stage.num_nodes),
            f"{stage.num_parameters:,}",
            f"{100 * stage.share:.1f} %",
            _sent(stage),
        )
    console.print(table)


def _sent(stage: CutStage) -> str:
    if stage.num_sent == 0:
        return "-"
    return f"{format_bytes(stage.sends_bytes)} in {stage.num_sent}"


def print_check(console: Console, report: ComparisonReport) -> None:
    """Show what a check compared, and its verdict: green where all is equal, else red."""
    console.print(Text(report.title, style="bold"), soft_wrap=True)
    table = Table()
    for heading in report.headings:
        table.add_column(heading, justify="right" if heading in ("compared", "equal") else "left")
    for row in report.table:
        table.add_row(*(Text(cell) for cell in row))  # `Text`: names of outputs hold square brackets
    console.print(table)
    console.print(Text(report.verdict, style="bold green" if report.equal else "bold red"), soft_wrap=True)


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all its columns, however narrow the terminal is: cut off, they tell nothing."""
    width = console.width
    console.width = _MAX_WIDTH
    console.width = max(width, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = width
