"""The flags that several commands have in common, each with its help."""

from pathlib import Path
from typing import Annotated

import typer


def _print_help(context: typer.Context, asked: bool) -> None:
    if asked:
        typer.echo(context.get_help())
        raise typer.Exit


# Of a group of commands, in the place of typer's own: that one, where it is not given, has pydantic convert a
# None, for which `evenflow train --help` would wait a tenth of a second.
Help = Annotated[
    bool, typer.Option("--help", callback=_print_help, is_eager=True, help="Show this message and exit.")
]
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG.toml|MODULE:FUNCTION",
        help="A configuration file, or a function (MODULE:FUNCTION or FILE.py:FUNCTION) that returns the "
        "model, the loss function and an example batch.",
    ),
]
Model = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A Hugging Face folder: a model and its tokenizer.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE_OR_FOLDER", help="Text to take the batch from; repeat it for more."),
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences in a batch of text.")]
Length = Annotated[int | None, typer.Option(help="Tokens in a sequence of text.")]
Seed = Annotated[int | None, typer.Option(help="Where the random numbers start.")]
StagesPerRank = Annotated[
    int | None, typer.Option(help="How many stages each rank holds. Default: what suits the schedule.")
]
Schedule = Annotated[str | None, typer.Option(help="The order of work, such as 1f1b, zb-v or auto.")]
Microbatches = Annotated[int | None, typer.Option(help="Into how many microbatches to split a batch.")]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is a GPU.")]
