"""The format of a picture, which the suffix of its file's name says."""

from os import PathLike
from pathlib import Path

from evenflow.errors import ConfigError

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
