"""`evenflow check`: one step split against one step of the whole model, in this process and on the CPU."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.cli.job import Flags, make_job
from evenflow.cli.printing import print_line
from evenflow.cli.report import print_cut
from evenflow.cli.source import refusing
from evenflow.cli.training import prepare_here
from evenflow.pipe.faults.check_report import CheckReport


def check(flags: Flags) -> bool:
    """Cut the model as `evenflow train` would, show the cut, compare, and return whether all is equal.

    The batch is the example that comes with the model, or the first of held-out text.

    Raises:
        EvenflowError: The model, the data or the cut cannot work as given, or the model's code fails.
    """
    job = make_job(flags)
    console = Console()
    with console.status("recording and cutting the model") as status:
        pipe, feed = prepare_here(job)
        try:
            with refusing("the step cannot be run"):
                print_cut(console, pipe.cut)
                report = pipe.check(feed.validation[0], progress=status.update)
        finally:
            pipe.close()
    _print(console, report)
    return report.equal


def _print(console: Console, report: CheckReport) -> None:
    """Show what a check compared, and its verdict: green where all is equal, else red."""
    print_line(console, report.title, "bold")
    table = Table()
    for heading in report.headings:
        table.add_column(heading, justify="right" if heading in ("compared", "equal") else "left")
    for row in report.table:
        table.add_row(*(Text(cell) for cell in row))  # `Text`: names of outputs hold square brackets
    console.print(table)
    print_line(console, report.verdict, "bold green" if report.equal else "bold red")
