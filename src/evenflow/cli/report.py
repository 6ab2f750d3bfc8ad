"""What the user sees of a run: how it was cut, where its last step went, its last line."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.table import Table

from evenflow.bill import Bill
from evenflow.cli.printing import print_line
from evenflow.journal.run import Run, Step, first_and_last_loss
from evenflow.pipe.building.holdings import StageSummary
from evenflow.view.units import format_bytes, time_unit


def print_cut(console: Console, cut: Iterable[StageSummary]) -> None:
    """Show each stage: its rank, nodes, parameters, estimated share of the work, and what it sends.

    What it sends are the activations that leave it for each microbatch: tensors, and bytes in all.
    """
    title = "The model, cut into stages (sends: per microbatch, bytes in how many tensors)"
    print_line(console, title, "bold")
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


def _sent(stage: StageSummary) -> str:
    if stage.num_sent == 0:
        return "-"
    return f"{format_bytes(stage.sends_bytes)} in {stage.num_sent}"


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


def last_line(run: Run, steps: Sequence[Step], validation_loss: float, loss_unit: str) -> str:
    """The last line of the output; the losses are in `loss_unit`, all three."""
    first, last = first_and_last_loss(steps) or (math.nan, math.nan)
    bubble = math.fsum(rank.idle for rank in run.ranks) / len(run.ranks)
    return (
        f"done: train loss {first:.3f} -> {last:.3f}, validation {validation_loss:.3f} {loss_unit}, "
        f"{run.items_per_second:.0f} {run.item}/s, step {1000 * run.step.median:.1f} ms, "
        f"bubble {100 * bubble:.1f} %"
    )
