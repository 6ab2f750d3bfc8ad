"""Hooks for `Pipeline.log_to` that write to TensorBoard and to Weights & Biases."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evenflow.errors import MissingPackageError
from evenflow.pipe.logs import LogHook


def log_to_tensorboard(folder: str | Path) -> LogHook:
    """A hook for `Pipeline.log_to` that writes each number as a curve into a TensorBoard folder.

    The folder is made when the hook is first called, which is on the main rank alone. Raises
    `MissingPackageError` where tensorboard is not installed.

        pipe.log_to(evenflow.log_to_tensorboard("runs/mine"), every=10)
    """
    _need("tensorboard", "log_to_tensorboard")
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

        pipe.log_to(evenflow.log_to_wandb("my-project", name="first try"), every=10)
    """
    _need("wandb", "log_to_wandb")
    run: Any = None  # wandb's class

    def hook(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal run
        if run is None:
            run = importlib.import_module("wandb").init(project=project, **options)
        run.log(dict(numbers), step=step)

    return hook


def _need(package: str, function: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"{function}() needs the package {package}, which is not installed: pip install {package}"
        )
