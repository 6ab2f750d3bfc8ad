"""What the library logs, shown where somebody watches: each message in the place of the one before."""

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.status import Status
from rich.text import Text


@contextlib.contextmanager
def logged_status(console: Console, first: str) -> Iterator[None]:
    """Show `first`, then each message that Evenflow logs at the level INFO or above."""
    logger = logging.getLogger("evenflow")
    level = logger.level
    with console.status(first) as status:
        handler = _ToStatus(status)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


class _ToStatus(logging.Handler):
    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno > logging.INFO:  # to be read, and not for a moment
            self._status.console.print(text, soft_wrap=True, highlight=False, markup=False)
        else:
            self._status.update(Text(text))
