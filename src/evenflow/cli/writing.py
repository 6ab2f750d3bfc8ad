"""Files that a command writes: one that cannot be written is refused by its name."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from evenflow.cli.printing import print_line
from evenflow.errors import ConfigError
from evenflow.journal.folder import write_text


def unwritable(option: str, path: Path) -> str | None:
    """Why what an option names cannot be written, be it there or not; None where it can.

    >>> unwritable("--out", Path("nowhere/plan.toml"))
    '--out nowhere/plan.toml: there is no folder nowhere; make it first'
    """
    if path.is_dir():
        return f"{option} {path} is a folder: name a file in it"
    if path.exists() and not path.is_file():
        return f"{option} {path} is no regular file, which a file would take the place of: name another"
    if not path.parent.is_dir():
        return f"{option} {path}: there is no folder {path.parent}; make it first"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{option} {path}: you may not write there; name another file"
    return None


def check_new(option: str, path: Path | None) -> None:
    """Raise `ConfigError` where no new file can be made at what an option names.

    >>> check_new("--out", Path("nowhere/plan.toml"))
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: --out nowhere/plan.toml: there is no folder nowhere; make it first
    """
    if path is None:
        return
    if (fault := unwritable(option, path)) is not None:
        raise ConfigError(fault)
    if path.exists():
        raise ConfigError(f"{option} {path}: it exists; name another file, or remove it first")


@contextlib.contextmanager
def refusing_to_write(path: Path) -> Iterator[None]:
    """Raise `ConfigError`, naming the file, for an `OSError` of the block that writes it.

    >>> with refusing_to_write(Path("nowhere/plan.csv")):
    ...     Path("nowhere/plan.csv").write_text("0F0")
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: cannot write nowhere/plan.csv: No such file or directory; name another file
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; name another file") from None


def write(console: Console, path: Path, text: str, *, told: str = "wrote") -> None:
    """Write a file, whole or not at all, and tell of it. Raises `ConfigError` where that fails."""
    with refusing_to_write(path):
        write_text(path, text)
    print_line(console, f"{told} {path}")
