"""`evenflow schedule`: its flags."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from evenflow.cli.shared_flags import Microbatches

Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A method, such as gpipe or 1f1b, or auto: the best found."),
]
Ranks = Annotated[int | None, typer.Option(help="How many ranks there are.")]
StagesPerRank = Annotated[
    int | None, typer.Option(help="How many stages each rank holds. Default: the method's own.")
]
Costs = Annotated[
    str | None,
    typer.Option(
        metavar="F,I,W[,COMM]|TIMES.csv",
        help="Seconds of a rank's forward, input gradient and weight gradient of one microbatch, and of "
        "a transfer; or a CSV of measured times per rank or per layer. Default: 1,1,1,0.",
    ),
]
Latency = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Of one transfer, where --costs is a CSV.")
]
Cap = Annotated[
    float | None,
    typer.Option(metavar="K", help="How many microbatches' activations a rank can hold at most."),
]
File = Annotated[
    Path | None,
    typer.Option(
        metavar="S.csv",
        help="A schedule of your own, or of torch's: a row for each rank, cells like 2F0.",
    ),
]
Draw = Annotated[Path | None, typer.Option(metavar="OUT.svg", help="Draw it to a file: .svg, .png or .pdf.")]
Save = Annotated[
    Path | None, typer.Option(metavar="S.csv", help="Write it to a new file, to edit, or to export.")
]
Compare = Annotated[bool, typer.Option("--compare", help="Tabulate all methods at these costs.")]
Objective = Annotated[
    Literal["span", "makespan"] | None,
    typer.Option(
        help="auto: what to make short, the longest rank's busy window or the step. Default: makespan."
    ),
]
Budget = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="auto: seconds of search, about. Default: 20.")
]
Seed = Annotated[int | None, typer.Option(help="auto: the same seed finds the same. Default: 0.")]


def schedule_command(
    name: Name = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    stages_per_rank: StagesPerRank = None,
    costs: Costs = None,
    latency: Latency = None,
    cap: Cap = None,
    file: File = None,
    draw: Draw = None,
    save: Save = None,
    compare: Compare = False,
    objective: Objective = None,
    budget: Budget = None,
    seed: Seed = None,
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
            compare=compare,
            objective=objective,
            budget_seconds=budget,
            seed=seed,
        )
    )
