"""The `evenflow` command: its subcommands, their flags, and how an error looks to the user."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from evenflow import __version__
from evenflow.cli.checkpoint_app import app as checkpoint_app
from evenflow.cli.collecting import no_collecting
from evenflow.cli.play_command import play_command
from evenflow.cli.schedule_command import schedule_command
from evenflow.cli.shared_flags import (
    BatchSize,
    Data,
    Device,
    Help,
    Length,
    Microbatches,
    Model,
    Schedule,
    Seed,
    Source,
    StagesPerRank,
)
from evenflow.cli.show_command import show_command
from evenflow.cli.train_flags import (
    BadNumbers,
    Demo,
    FindNan,
    KeepLast,
    LogJson,
    MaxRestarts,
    Resume,
    SaveEvery,
    Tensorboard,
    TensorboardFolder,
    Timeout,
)
from evenflow.errors import EvenflowError
from evenflow.needs import need_torch

# Of the commands that ended because of an error: 2, which shells use for "called wrongly", and what
# follows it in the same file of errors.
_EXIT_CODE = 2

app = typer.Typer(
    name="evenflow",
    help="Pipeline parallelism for PyTorch: an ordinary model, cut into balanced stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in frames and colours would take rich a tenth of a second to import
)


app.add_typer(checkpoint_app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"evenflow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    show_help: Help = False,
) -> None:
    """The options that stand before a command."""


@app.command("train")
def train_command(
    source: Source = None,
    model: Model = None,
    demo: Demo = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="Text to train on; repeat it for more. Default: the configuration's, or the documentation "
            "that ships inside Python.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How many batches to train on.")] = None,
    batch_size: BatchSize = None,
    length: Length = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    seed: Seed = None,
    stages: Annotated[
        int | None,
        typer.Option(help="Into how many stages to cut. Default: for a rank per GPU, or 2 without GPUs."),
    ] = None,
    stages_per_rank: StagesPerRank = None,
    schedule: Schedule = None,
    microbatches: Microbatches = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.toml", help="What `evenflow plan -o` wrote: it decides all of these."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A new folder to write to. Default: runs/NAME, or runs/NAME-2 if that is taken, and so on.",
        ),
    ] = None,
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
    tensorboard_folder: TensorboardFolder = None,
) -> None:
    """Train a model as a pipeline: one process per rank.

    Where nothing is said of stages, schedule and microbatches, the ranks measure the model and plan them.
    """
    need_torch("evenflow train")
    # What takes long to import, which --help and --version need not wait for.
    from evenflow.cli.train import Flags, train

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
            tensorboard=tensorboard_folder or tensorboard or None,
        )
    )


@app.command("check")
def check_command(
    source: Source = None,
    model: Model = None,
    data: Data = None,
    batch_size: BatchSize = None,
    length: Length = None,
    seed: Seed = None,
    stages: Annotated[
        int | None, typer.Option(help="Into how many stages to cut. Default: those of 2 ranks.")
    ] = None,
    stages_per_rank: StagesPerRank = None,
    schedule: Schedule = None,
    microbatches: Microbatches = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Let shared parameters get the same bits at every cut.")
    ] = False,
) -> None:
    """Compare one step split with one step of the whole model.

    It compares every gradient, buffer and output, in one process and on the CPU. Exits with 0 where all is
    equal, 1 where something differs.
    """
    need_torch("evenflow check")
    from evenflow.cli.check import check
    from evenflow.cli.train import Flags

    equal = check(
        Flags(
            source=source,
            model=model,
            data=tuple(data or ()),
            batch_size=batch_size,
            length=length,
            seed=seed,
            stages=stages,
            stages_per_rank=stages_per_rank,
            schedule=schedule,
            num_microbatches=microbatches,
            exact=exact or None,
            device="cpu",
        )
    )
    raise typer.Exit(0 if equal else 1)


@app.command("doctor")
def doctor_command(
    device: Device = None,
    ranks: Annotated[
        int | None, typer.Option(help="How many ranks on this machine. Default: one a GPU, or 2 on CPUs.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="CLUSTER.toml", help="Write what was found to a new file."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a link may take to answer.")
    ] = 20.0,
) -> None:
    """Check every link both ways: its data, its speed, what helps.

    Under torchrun it examines several machines. Exits with 0 where all links work, 1 where one does not.
    """
    need_torch("evenflow doctor")
    from evenflow.cli.doctor import doctor

    raise typer.Exit(0 if doctor(device, ranks, out, timeout) else 1)


@app.command("plan")
def plan_command(
    source: Source = None,
    model: Model = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER.toml|8xH100",
            help="A cluster file, or devices in a few words. Default: this machine, measured.",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="24GiB", help="How much memory each device has.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows of a step's batch, over all devices. Default: the example's.")
    ] = None,
    data: Data = None,
    batch_size: BatchSize = None,
    length: Length = None,
    pipeline_only: Annotated[
        bool,
        typer.Option("--pipeline-only", help="Plan pipeline ranks alone: no data or tensor ranks."),
    ] = False,
    target: Annotated[
        Literal["torchtitan", "megatron", "deepspeed"] | None,
        typer.Option(help="Plan only what this system can run, and print its settings."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PLAN.toml", help="Write the plan to a new file.")
    ] = None,
) -> None:
    """Choose how to train a model on a cluster.

    It chooses stages, cuts, schedule, microbatches and what is recomputed. A cluster need not be there: times
    are then estimated from operations and bytes. Without one, as many processes as `evenflow train` would
    start here measure the model, their links and the optimizer.
    """
    with no_collecting():
        need_torch("evenflow plan")
        from evenflow.cli.plan import Asked, plan_run
        from evenflow.cli.train import Flags

    flags = Flags(source=source, model=model, data=tuple(data or ()), batch_size=batch_size, length=length)
    asked = Asked(cluster, memory, rows, pipeline_only=pipeline_only, target=target, out=out)
    plan_run(flags, asked)


@app.command("export")
def export_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN.toml|SCHEDULE.csv",
            help="What `evenflow plan -o` or `evenflow schedule --save` wrote.",
        ),
    ],
    to: Annotated[
        Literal["torch", "torchtitan", "megatron", "deepspeed"],
        typer.Option(help="The system; torch is torch.distributed.pipelining, which reads a schedule."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it to a new file.")
    ] = None,
) -> None:
    """Say a saved plan in another system's words.

    These are settings to paste, or, for torch, the order of work. Nothing is planned anew. What the system
    cannot run is refused, with every reason.
    """
    from evenflow.cli.export import export

    export(source, to, out)


@app.command("profile")
def profile_command(
    source: Source = None,
    model: Model = None,
    data: Data = None,
    batch_size: BatchSize = None,
    length: Length = None,
    seed: Seed = None,
    stages: Annotated[
        int | None,
        typer.Option(help="For how many stages: more make finer nodes. Default: those of 2 ranks."),
    ] = None,
    microbatches: Microbatches = None,
    device: Device = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it to a new file, for evenflow schedule --costs."),
    ] = None,
) -> None:
    """Measure what each node of a model costs.

    That is its time, its memory, and the bytes over each place to cut. Measurements are kept in
    EVENFLOW_CACHE, by default ~/.cache/evenflow, and not made again.
    """
    need_torch("evenflow profile")
    from evenflow.cli.profile import profile
    from evenflow.cli.train import Flags

    profile(
        Flags(
            source=source,
            model=model,
            data=tuple(data or ()),
            batch_size=batch_size,
            length=length,
            seed=seed,
            stages=stages,
            num_microbatches=microbatches,
            device=device,
        ),
        csv=csv,
    )


app.command("schedule")(schedule_command)
app.command("show")(show_command)
app.command("play")(play_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default the process's own; an `EvenflowError` becomes one red message.

    Exits with 0, 1 where `check` or `doctor` found a fault, 2 for an error that the user can read, 130 for
    Ctrl-C.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        evenflow 0.1.0
    """
    try:
        app(args=list(arguments) if arguments is not None else None)
    except EvenflowError as error:
        from rich.console import Console
        from rich.text import Text

        from evenflow.foreign import visible

        console = Console(stderr=True)
        # `Text`, because a message may hold square brackets, which rich would take for markup.
        # A message may quote what stands in a file, and a terminal obeys control characters.
        console.print(Text(f"error: {visible(str(error))}", style="bold red"), soft_wrap=True)
        for note in getattr(error, "__notes__", ()):
            console.print(Text(visible(note), style="dim"), soft_wrap=True)
        raise SystemExit(_EXIT_CODE) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if arguments is None:
            gc.freeze()  # the process ends: a last look at all that was imported takes a second
