"""The bubble bill as a table: what was predicted, and below it what came out."""

from collections.abc import Sequence
from dataclasses import fields

from rich import box
from rich.table import Table

from evenflow.bill import Bill
from evenflow.view.units import time_unit


def bill_table(predicted: Sequence[Bill], measured: Sequence[Bill]) -> Table:
    """A row for each rank and each of the two; all numbers are in the unit that the head names.

    >>> bill = Bill(compute=6e-3, schedule=2e-3, imbalance=1e-3, transfer=0, host=0, update=0)
    >>> table = bill_table([bill], [bill])
    >>> table.row_count, [column.header for column in table.columns][:3]
    (2, ['rank', '', 'compute'])
    """
    unit = time_unit(max(bill.step for bill in (*predicted, *measured)))
    names = [each.name for each in fields(Bill)]
    title = f"where the last step went, in {unit.name}"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("rank", justify="right")
    table.add_column("")
    for name in (*names, "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, pair in enumerate(zip(predicted, measured, strict=True)):
        for what, bill in zip(("predicted", "measured"), pair, strict=True):
            numbers = [getattr(bill, name) for name in names]
            cells = [f"{seconds / unit.size:.1f}" for seconds in (*numbers, bill.step)]
            table.add_row(str(rank) if what == "predicted" else "", what, *cells)
    return table
