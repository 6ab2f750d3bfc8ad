"""`evenflow train`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from evenflow.cli.shared_flags import (
    BatchSize,
    Device,
    Length,
    Microbatches,
    Model,
    Schedule,
    Seed,
    Source,
    StagesPerRank,
)
from evenflow.needs import need_torch

Demo = Annotated[
    bool,
    typer.Option(
        "--demo", help="Train the small built-in GPT, which needs no file: under a minute on two CPU cores."
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE_OR_FOLDER",
        help="Text to train on; repeat it for more. Default: the configuration's, or the documentation "
        "that ships inside Python.",
    ),
]
Steps = Annotated[int | None, typer.Option(help="How many batches to train on.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
Stages = Annotated[
    int | None,
    typer.Option(help="Into how many stages to cut. Default: for a rank per GPU, or 2 without GPUs."),
]
Plan = Annotated[
    Path | None,
    typer.Option(metavar="PLAN.toml", help="What `evenflow plan -o` wrote: it decides all of these."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="A new folder to write to. Default: runs/NAME, or runs/NAME-2 if that is taken, and so on.",
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
    str | None,
    typer.Option(
        metavar="stop|skip|rollback|ignore",
        help="What becomes of a step with NaN or infinite loss or gradients; rollback goes on from the last "
        "checkpoint, with the batches behind. Default: stop.",
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


def train_command(
    source: Source = None,
    model: Model = None,
    demo: Demo = False,
    data: Text = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    length: Length = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    stages: Stages = None,
    stages_per_rank: StagesPerRank = None,
    schedule: Schedule = None,
    microbatches: Microbatches = None,
    plan: Plan = None,
    out: Out = None,
    save_every: SaveEvery = None,
    keep_last: KeepLast = None,
    resume: Resume = None,
    max_restarts: MaxRestarts = 0,
    device: Device = None,
    bad_numbers: BadNumbers = None,
    find_nan: FindNan = False,
    timeout: Timeout = None,
    log_json: LogJson = None,
    tensorboard: Tensorboard = False,
) -> None:
    """Train a model as a pipeline: one process per rank.

    Where nothing is said of stages, schedule and microbatches, the ranks measure the model and plan them.
    """
    need_torch("evenflow train")
    # What takes long to import, which --help and --version need not wait for.
    from evenflow.cli.job import Flags
    from evenflow.cli.train import train

    train(
        Flags(
            source=source,
            model=model,
            demo=demo,
            data=tuple(data or ()),
            steps=steps,
            batch_size=batch_size,
            length=length,
            learning_rate=learning_rate,
            seed=seed,
            stages=stages,
            stages_per_rank=stages_per_rank,
            schedule=schedule,
            num_microbatches=microbatches,
            plan=plan,
            out=out,
            resume=resume,
            save_every=save_every,
            keep_last=keep_last,
            max_restarts=max_restarts,
            device=device,
            bad_numbers=bad_numbers,
            find_nan=find_nan or None,
            timeout=timeout,
            log_json=log_json,
            tensorboard=tensorboard or None,
        )
    )
