"""`evenflow show`: its flags."""

from pathlib import Path
from typing import Annotated

import typer


def show_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `evenflow train` has written.")],
    page: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="Where the page of the run goes. Default: RUN/page.html."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="STEP.svg", help="Draw the last step to a file too: .svg, .png or .pdf."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="STEP.json", help="Write the last step as a trace, for https://ui.perfetto.dev."
        ),
    ] = None,
) -> None:
    """Show what a run's steps took: step, ranks and stages, beside what its plan expected; and as a page.

    The page is one file that needs no network: every rank over time, memory, idle time by its cause, the cut.
    """
    from evenflow.cli.show import Files, show

    show(run, Files(page, picture, trace))
