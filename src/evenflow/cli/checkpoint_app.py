"""`evenflow checkpoint`: its subcommands and their flags."""

from pathlib import Path
from typing import Annotated

import typer

from evenflow.cli.shared_flags import Model, Source

app = typer.Typer(
    name="checkpoint",
    help="List, verify, export and import checkpoints.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint; of a run's folder, the newest."),
]


@app.command("ls")
def ls_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one of checkpoints.")],
) -> None:
    """List the checkpoints of a folder: their step, size, layout, and when they were written."""
    from evenflow.cli.checkpoint import ls

    ls(folder)


@app.command("verify")
def verify_command(checkpoint: _Checkpoint) -> None:
    """Read all of a checkpoint and compare it with its checksums. Exits with 1 where something is wrong."""
    from evenflow.cli.checkpoint import verify

    raise typer.Exit(0 if verify(checkpoint) else 1)


@app.command("export")
def export_command(
    checkpoint: _Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder to write to.")],
    source: Source = None,
    model: Model = None,
) -> None:
    """Write the weights as others load them: a Hugging Face model as `from_pretrained` reads it.

    Of which model they are, the run's own config.toml says, unless it is named here. A model of your own
    comes as safetensors under the names of its state_dict.
    """
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
    """Make a checkpoint of a model's weights, from which a run begins: step 0, without optimizer states."""
    from evenflow.cli.checkpoint import import_weights

    import_weights(weights, checkpoint, source, model)
