"""The `evenflow` command: its subcommands, their flags, and how an error looks to the user."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from evenflow import __version__
from evenflow.cli.checkpoint_app import app as checkpoint_app
from evenflow.cli.collecting import no_collecting
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
from evenflow.cli.train_command import train_command
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


app.command("train")(train_command)


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
    from evenflow.cli.job import Flags

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
        from evenflow.cli.job import Flags
        from evenflow.cli.plan import Asked, plan_run

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
    from evenflow.cli.job import Flags
    from evenflow.cli.profile import profile

    profile(
        Flags(
            source=source,
            model=model,
            data=tuple(data or ()),
            batch_size=batch_size,
            length=length,
            stages=stages,
            num_microbatches=microbatches,
            device=device,
        ),
        csv=csv,
    )


app.command("schedule")(schedule_command)


@app.command("show")
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


@app.command("play")
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

        from evenflow.cli.printing import print_line
        from evenflow.foreign import visible

        console = Console(stderr=True)
        # A message may quote what stands in a file, and a terminal obeys control characters.
        print_line(console, f"error: {visible(str(error))}", "bold red")
        for note in getattr(error, "__notes__", ()):
            print_line(console, visible(note), "dim")
        raise SystemExit(_EXIT_CODE) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if arguments is None:
            gc.freeze()  # the process ends: a last look at all that was imported takes a second
