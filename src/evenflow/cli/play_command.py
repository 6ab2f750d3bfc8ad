"""`evenflow play`: its flags."""

from typing import Annotated

import typer


def play_command(
    port: Annotated[
        int,
        typer.Option(
            metavar="PORT",
            help="Where it listens, on this machine alone. Default: any that is free.",
            show_default=False,
        ),
    ] = 0,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser on it.")] = True,
) -> None:
    """Play with schedules on a local page.

    Ranks, microbatches, costs and memory are levers: whenever one is moved the step is simulated and drawn.
    """
    from evenflow.cli.play import play

    play(port, opens=opens)
