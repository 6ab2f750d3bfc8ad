"""Files that a command writes: one that cannot be written is refused by its name."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from evenflow.errors import ConfigError


def check_new(option: str, path: Path | None) -> None:
    """Raise `ConfigError` where no new file can be made at what an option names.

    >>> check_new("--out", Path("nowhere/plan.toml"))
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: --out nowhere/plan.toml: there is no folder nowhere; make it first
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{option} {path}: it exists; name another file, or remove it first")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")


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
