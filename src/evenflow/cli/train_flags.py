"""The flags of `evenflow train` alone: the demonstration, logs, and what becomes of a long run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Demo = Annotated[
    bool,
    typer.Option(
        "--demo", help="Train the small built-in GPT, which needs no file: under a minute on two CPU cores."
    ),
]
SaveEvery = Annotated[
    int | None, typer.Option(metavar="STEPS", help="Save a checkpoint every so many steps.")
]
KeepLast = Annotated[int | None, typer.Option(help="How many of these checkpoints to keep. Default: 2.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Go on with the run in this folder, at any number of ranks; or start one there.",
    ),
]
MaxRestarts = Annotated[
    int, typer.Option(help="How often to start again, from the last checkpoint, where a rank is lost.")
]
BadNumbers = Annotated[
    Literal["stop", "skip", "rollback", "ignore"] | None,
    typer.Option(
        help="What becomes of a step with NaN or infinite loss or gradients; rollback goes on from the last "
        "checkpoint, with the batches behind. Default: stop."
    ),
]
FindNan = Annotated[bool, typer.Option("--find-nan", help="Watch each node of each step for them: slower.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="How long a rank may wait for one that does not move, before all end. Default: 300.",
    ),
]
LogJson = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a line of JSON for each step to this file; - is the standard output, which then has "
        "nothing else.",
    ),
]
Tensorboard = Annotated[
    bool, typer.Option("--tensorboard", help="Write curves for TensorBoard, into the run's folder.")
]
TensorboardFolder = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Write curves for TensorBoard into this folder.")
]
