"""Files that a command writes: one that cannot be written is refused by its name."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from evenflow.errors import ConfigError


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
