"""What a run writes of each step, and where all else goes that it has to say."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.status import Status
from rich.text import Text

from evenflow.cli.config import STDOUT, Logging
from evenflow.cli.printing import print_line
from evenflow.interop.loggers import check_installed, log_to_json
from evenflow.pipe.times.logs import LogHook


def check_logs(logs: Logging) -> None:
    """Raise `ConfigError` for what cannot be written, before anything starts."""
    json_hook(logs)
    if logs.tensorboard:
        check_installed("tensorboard", "--tensorboard")


def json_hook(logs: Logging) -> LogHook | None:
    """What writes the lines of JSON, if any are asked for."""
    return None if logs.json is None else log_to_json(logs.json)


def console_of(logs: Logging, *, is_main: bool = True) -> Console:
    """Where a person reads of the run: on the error stream where steps go to the standard output."""
    return Console(stderr=logs.json == STDOUT, quiet=not is_main)


def user_output(logs: Logging) -> AbstractContextManager[object]:
    """Inside, what the model's own code prints goes where a person reads."""
    return contextlib.redirect_stdout(sys.stderr) if logs.json == STDOUT else contextlib.nullcontext()


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
            print_line(self._status.console, text)
        else:
            self._status.update(Text(text))
