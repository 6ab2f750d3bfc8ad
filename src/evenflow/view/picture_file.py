"""The file of a picture: the suffix of its name says the format."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from evenflow.errors import ConfigError
from evenflow.view.svg import compact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")


def picture_format(path: str | PathLike[str]) -> str:
    """Return the format that a path asks for by its suffix; `ConfigError` for one that can't be drawn.

    >>> picture_format("out.svg")
    'svg'
    """
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise ConfigError(f"cannot draw {path}: end its name in {', '.join('.' + name for name in FORMATS)}")
    return suffix


def save_picture(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure in the format of `path`, over what is there. Raises as `picture_format`, and `OSError`.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_picture(Figure(), Path(folder) / "empty.svg")
    ...     (Path(folder) / "empty.svg").read_text()[:5]
    '<?xml'
    """
    from matplotlib import rc_context

    suffix = picture_format(path)
    if suffix != "svg":
        figure.savefig(path, format=suffix)
        return
    # The same schedule makes the same file: no date, and no random names inside. Letters stay letters, which
    # can be searched and read aloud.
    with (
        rc_context({"svg.hashsalt": "evenflow", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}),
        io.StringIO() as written,
    ):
        figure.savefig(written, format=suffix, metadata={"Date": None})
        Path(path).write_text(compact(written.getvalue()), encoding="utf-8")
