"""Evenflow: pipeline parallelism for PyTorch models that are too big for one device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenflow.errors import (
    BadNumbersError,
    ConfigError,
    EvenflowError,
    MissingPackageError,
    OutOfMemoryError,
    PeerError,
    RecordError,
    ScheduleError,
)

if TYPE_CHECKING:
    from evenflow.graph.deferred import deferred_init
    from evenflow.interop.loggers import log_to_json, log_to_tensorboard, log_to_wandb
    from evenflow.interop.progress import progress
    from evenflow.interop.trainer import PipelineTrainer
    from evenflow.launcher import launch
    from evenflow.pipe.build import pipeline
    from evenflow.pipe.checkpoints import Checkpoints
    from evenflow.pipe.pipeline import Pipeline
    from evenflow.pipe.step.result import StepResult
    from evenflow.runtime.recorded.microbatch import Microbatches

__version__ = "0.1.0"
__all__ = [
    "BadNumbersError",
    "Checkpoints",
    "ConfigError",
    "EvenflowError",
    "Microbatches",
    "MissingPackageError",
    "OutOfMemoryError",
    "PeerError",
    "Pipeline",
    "PipelineTrainer",
    "RecordError",
    "ScheduleError",
    "StepResult",
    "deferred_init",
    "launch",
    "log_to_json",
    "log_to_tensorboard",
    "log_to_wandb",
    "pipeline",
    "progress",
]

# Looked up on first use: `import evenflow.schedules` must not take the seconds that importing torch takes.
_HOMES = {
    "Checkpoints": "evenflow.pipe.checkpoints",
    "Microbatches": "evenflow.runtime.recorded.microbatch",
    "Pipeline": "evenflow.pipe.pipeline",
    "PipelineTrainer": "evenflow.interop.trainer",
    "StepResult": "evenflow.pipe.step.result",
    "deferred_init": "evenflow.graph.deferred",
    "launch": "evenflow.launcher",
    **dict.fromkeys(("log_to_json", "log_to_tensorboard", "log_to_wandb"), "evenflow.interop.loggers"),
    "pipeline": "evenflow.pipe.build",
    "progress": "evenflow.interop.progress",
}


def __getattr__(name: str) -> Any:  # whatever the name stands for
    if name in _HOMES:
        import_module("evenflow.needs").need_torch(f"evenflow.{name}")
        # Not kept in globals(): a submodule of the same name (`launch`) would take its place.
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evenflow' has no attribute {name!r}")
