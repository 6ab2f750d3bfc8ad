"""What commands print: lines, tables and lanes that nothing cuts off or colours on its own."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.ir.timeline import Timeline
from evenflow.view.terminal import lanes_text

_MIN_LANES_WIDTH = 40
_MAX_TABLE_WIDTH = 200


def print_line(console: Console, text: str | Text, style: str = "") -> None:
    """Print a line as it stands: not wrapped, and square brackets are square brackets.

    >>> print_line(Console(), "wrote runs/[mine]")
    wrote runs/[mine]
    """
    console.print(Text(text, style) if isinstance(text, str) else text, soft_wrap=True, highlight=False)


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all its columns, however narrow the terminal is: cut off, they tell nothing."""
    width = console.width
    console.width = _MAX_TABLE_WIDTH
    console.width = max(width, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = width


def print_lanes(console: Console, timeline: Timeline) -> None:
    """Draw a lane for each rank, as wide as the terminal is, and an empty line."""
    width = max(_MIN_LANES_WIDTH, console.width)
    console.print(lanes_text(timeline, width=width), no_wrap=True, crop=False)
    console.print()
