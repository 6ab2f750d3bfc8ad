"""Hooks for `Pipeline.log_to` that write lines of JSON, to TensorBoard and to Weights & Biases."""

import contextlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evenflow.errors import ConfigError, MissingPackageError
from evenflow.foreign import file_in_the_way
from evenflow.pipe.times.logs import LogHook

STDOUT = "-"


def log_to_json(path: str | Path) -> LogHook:
    """A hook for `Pipeline.log_to` that writes each step's numbers as a line of JSON, to a file or to "-".

    "-" is the standard output. Lines are added to a file that is there; each is whole as soon as the step has
    ended. JSON knows no NaN and no infinity: such a number is null, and `not_finite` says which it was. The
    file is made when the hook is first called, which is on the main rank alone. Raises `ConfigError` for a
    path that cannot be a file, and, in the step, for what cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hook = log_to_json(f"{folder}/mine.jsonl")  # for pipe.log_to(hook)
    ...     hook(1, {"loss": 2.5})
    ...     hook(2, {"loss": float("nan")})
    ...     print(Path(folder, "mine.jsonl").read_text(), end="")
    {"step": 1, "loss": 2.5}
    {"step": 2, "loss": null, "not_finite": {"loss": "nan"}}
    """
    if str(path) == STDOUT:
        stream = sys.stdout  # as it is now: a moving bar puts something else there

        def print_line(step: int, numbers: Mapping[str, float]) -> None:
            with _refusing("the standard output"):
                stream.write(f"{_line(step, numbers)}\n")
                stream.flush()

        return print_line

    file, is_whole = Path(path), False
    _check_file(file)

    def add_line(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal is_whole
        with _refusing(str(file)):
            start = "" if is_whole else _begun(file)
            with file.open("a", encoding="utf-8") as opened:  # for each line: nobody would close it
                opened.write(f"{start}{_line(step, numbers)}\n")
        is_whole = True

    return add_line


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write the log to {name}: {error.strerror or error}") from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"cannot write the log to {path}: it is a folder; name a file")
    if (found := file_in_the_way(path.parent)) is not None:
        raise ConfigError(f"cannot write the log to {path}: {found} is a file, not a folder")


def _begun(file: Path) -> str:
    """Make the file's folder; what ends the last line, where a run was stopped in the middle of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or file.stat().st_size == 0:
        return ""
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return "" if opened.read() == b"\n" else "\n"


def _line(step: int, numbers: Mapping[str, float]) -> str:
    bad = {name: str(float(number)) for name, number in numbers.items() if not math.isfinite(number)}
    shown = {name: None if name in bad else number for name, number in numbers.items()}
    return json.dumps({"step": step, **shown, **({"not_finite": bad} if bad else {})}, allow_nan=False)


def log_to_tensorboard(folder: str | Path) -> LogHook:
    """A hook for `Pipeline.log_to` that writes each number as a curve into a TensorBoard folder.

    The folder is made when the hook is first called, which is on the main rank alone. Raises
    `MissingPackageError` where tensorboard is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hook = log_to_tensorboard(folder)  # for pipe.log_to(hook, every=10)
    ...     hook(1, {"loss": 2.5})
    ...     len(list(Path(folder).glob("events.*")))
    1
    """
    check_installed("tensorboard", "log_to_tensorboard()")
    writer: Any = None  # torch's class, which imports tensorboard

    def hook(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            writer = SummaryWriter(str(folder))
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()  # nobody closes it, and a run may be killed

    return hook


def log_to_wandb(project: str, **options: Any) -> LogHook:
    """A hook for `Pipeline.log_to` that logs to a Weights & Biases run of its own.

    `options` are those of `wandb.init`, which is called when the hook first is: on the main rank alone.
    Raises `MissingPackageError` where wandb is not installed.

    >>> pipe.log_to(log_to_wandb("my-project", name="first try"), every=10)  # doctest: +SKIP
    """
    check_installed("wandb", "log_to_wandb()")
    run: Any = None  # wandb's class

    def hook(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal run
        if run is None:
            run = importlib.import_module("wandb").init(project=project, **options)
        run.log(dict(numbers), step=step)

    return hook


def check_installed(package: str, what: str) -> None:
    """Raise `MissingPackageError`, saying what needs the package, where it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"{what} needs the package {package}, which is not installed: pip install {package}"
        )
