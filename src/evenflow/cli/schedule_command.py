"""`evenflow schedule`: its flags."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def schedule_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A method, such as gpipe or 1f1b, or auto: the best found."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="How many ranks there are.")] = None,
    microbatches: Annotated[
        int | None, typer.Option(help="Into how many microbatches a batch is split.")
    ] = None,
    stages_per_rank: Annotated[
        int | None, typer.Option(help="How many stages each rank holds. Default: the method's own.")
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="F,I,W[,COMM]|TIMES.csv",
            help="Seconds of a rank's forward, input gradient and weight gradient of one microbatch, and of "
            "a transfer; or a CSV of measured times per rank or per layer. Default: 1,1,1,0.",
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Of one transfer, where --costs is a CSV.")
    ] = None,
    cap: Annotated[
        float | None,
        typer.Option(metavar="K", help="How many microbatches' activations a rank can hold at most."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="S.csv",
            help="A schedule of your own, or of torch's: a row for each rank, cells like 2F0.",
        ),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="OUT.svg", help="Draw it to a file: .svg, .png or .pdf.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="S.csv", help="Write it to a new file, to edit by hand.")
    ] = None,
    torch: Annotated[
        bool, typer.Option("--torch", help="Save it as torch.distributed.pipelining reads it.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Tabulate all methods at these costs.")] = False,
    objective: Annotated[
        Literal["span", "makespan"] | None,
        typer.Option(
            help="auto: what to make short, the longest rank's busy window or the step. Default: makespan."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="auto: seconds of search, about. Default: 20.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="auto: the same seed finds the same. Default: 0.")] = None,
) -> None:
    """Draw a schedule and price it.

    It tells the schedule's idle time, its memory and how far it is from the best possible.
    """
    from evenflow.cli.schedule import schedule
    from evenflow.cli.schedule_flags import Flags

    schedule(
        Flags(
            name=name,
            num_ranks=ranks,
            num_microbatches=microbatches,
            stages_per_rank=stages_per_rank,
            costs=costs,
            latency_seconds=latency,
            cap=cap,
            file=file,
            draw=draw,
            save=save,
            torch=torch,
            compare=compare,
            objective=objective,
            budget_seconds=budget,
            seed=seed,
        )
    )
