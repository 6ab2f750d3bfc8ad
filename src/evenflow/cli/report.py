"""What the user sees of a run: how the model was cut, the progress, and the line that sums it up.

On a terminal a bar moves; in a file or a pipe there is a line now and then instead.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from evenflow.view.units import format_bytes

# So many lines, evenly spread, stand in for the bar where output goes to a file.
_NUM_LINES = 10
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


class ProgressReport:
    """The moving part of the output, to be used in a `with` block around the training loop."""

    def __init__(self, console: Console, *, num_steps: int, units: Units) -> None:
        self._console = console
        self._num_steps = num_steps
        self._units = units
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._next_line = 1
        self._task = self._progress.add_task("train", total=num_steps, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, number: int, *, loss: float, step_seconds: float) -> None:
        """Report that `number` steps are done; `loss` is the last one's."""
        items_per_second = self._units.num_items_per_batch / step_seconds
        pace = f"{items_per_second:,.0f} {self._units.item}/s  {1000 * step_seconds:.0f} ms/step"
        numbers = f"loss {loss:.3f}  {pace}"
        self._progress.update(self._task, completed=number, numbers=numbers)
        if not self._console.is_terminal and number >= self._next_line:
            self.line(f"step {number}/{self._num_steps}  {numbers}")
            lines_done = number * _NUM_LINES // self._num_steps
            self._next_line = math.ceil((lines_done + 1) * self._num_steps / _NUM_LINES)

    def line(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
