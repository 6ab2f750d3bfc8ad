"""`evenflow checkpoint`: its subcommands and their flags."""

from pathlib import Path
from typing import Annotated

import typer

from evenflow.cli.shared_flags import Help, Model, Source
from evenflow.needs import need_torch

app = typer.Typer(
    name="checkpoint",
    no_args_is_help=True,
    rich_markup_mode=None,  # as of `evenflow` itself
)


@app.callback()
def _options(show_help: Help = False) -> None:
    """List, verify, export and import checkpoints."""


_Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint; of a run's folder, the newest."),
]


@app.command("ls")
def ls_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one of checkpoints.")],
) -> None:
    """List the checkpoints of a folder.

    Of each: its step, size and layout, and when it was written.
    """
    need_torch("evenflow checkpoint ls")
    from evenflow.cli.checkpoint import ls

    ls(folder)


@app.command("verify")
def verify_command(checkpoint: _Checkpoint) -> None:
    """Read all of a checkpoint and compare it with its checksums. Exits with 1 where something is wrong."""
    need_torch("evenflow checkpoint verify")
    from evenflow.cli.checkpoint import verify

    raise typer.Exit(0 if verify(checkpoint) else 1)


@app.command("export")
def export_command(
    checkpoint: _Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder to write to.")],
    source: Source = None,
    model: Model = None,
) -> None:
    """Write the weights as others load them.

    A Hugging Face model comes as `from_pretrained` reads it, a model of your own as safetensors under the
    names of its state_dict. Of which model they are, the run's own config.toml says, unless it is named here.
    """
    need_torch("evenflow checkpoint export")
    from evenflow.cli.checkpoint import export

    export(checkpoint, folder, source, model)


@app.command("import")
def import_command(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="A folder of safetensors: Hugging Face's, or an export.")
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A new folder to write to.")],
    source: Source = None,
    model: Model = None,
) -> None:
    """Make a checkpoint of a model's weights, to begin a run from.

    It is of step 0, without optimizer states.
    """
    need_torch("evenflow checkpoint import")
    from evenflow.cli.checkpoint import import_weights

    import_weights(weights, checkpoint, source, model)
