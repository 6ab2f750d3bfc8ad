"""What `pipeline` is asked for beside the cut and the order of work, checked before anything is recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenflow.cost.optimizer import OptimizerFactory
from evenflow.errors import ConfigError
from evenflow.pipe.given.cuts import check_split
from evenflow.pipe.given.precision import Precision
from evenflow.pipe.given.refuse import check_callable, check_whole
from evenflow.pipe.parameters.norm import check_clip_norm
from evenflow.pipe.parameters.rules import OnBadNumbers
from evenflow.pipe.parameters.tensor_plan import TensorPlan
from evenflow.pipe.parameters.update import SchedulerFactory
from evenflow.runtime.links import choose
from evenflow.runtime.program.compiled import Compiling
from evenflow.runtime.recorded.joining import Joining
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.recorded.weights import CHOICES, ReductionChoice
from evenflow.runtime.stages.narrowing import Narrowing


@dataclass(frozen=True, slots=True)
class Asked:
    """`pipeline`'s arguments of the same names, or what they stand for.

    Raises `ConfigError` naming the first with which no model could work.
    """

    model: torch.nn.Module
    loss: Program
    example: Any
    optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    split: Sequence[str]  # empty without
    recomputed: Sequence[str]  # modules that recompute= names
    reduction: ReductionChoice
    joining: Joining  # of metrics
    atomic: tuple[type[torch.nn.Module], ...]
    exact: bool
    load: Path | None
    link: str
    narrowing: Narrowing  # of boundary_dtype
    compiling: Compiling | None
    precision: Precision
    clip_norm: float | None
    on_bad_numbers: OnBadNumbers
    tensor_plan: TensorPlan | None
    offload: str | None
    seed: int

    def __post_init__(self) -> None:
        check_whole(seed=self.seed)
        _check_loss(self.loss)
        check_callable(optimizer=self.optimizer, scheduler=self.scheduler)
        if self.scheduler is not None and self.optimizer is None:
            raise ConfigError("scheduler= needs optimizer=: it is called with the optimizer that it steers")
        _check_reduction(self.reduction)
        _check_link(self.link)
        check_clip_norm(self.clip_norm)
        _check_offload(self.offload)
        check_split(self.model, self.split)


def _check_loss(loss: object) -> None:
    """Raise `ConfigError` for a `loss=` that is no function."""
    if isinstance(loss, dict | list | tuple):
        raise ConfigError(
            f"loss= must be a function, not a {type(loss).__name__}; where losses take turns (a GAN's), give "
            "one function that looks at a plain value of the batch to know whose turn it is "
            "(docs/training.md)"
        )
    check_callable(loss=loss)


def _check_link(link: object) -> None:
    """Raise `ConfigError` for a `link=` that is none of those known."""
    if link not in choose.CHOICES:
        raise ConfigError(f"link={link!r} is none of {', '.join(map(repr, choose.CHOICES))}")


def _check_offload(offload: object) -> None:
    """Raise `ConfigError` for an `offload=` that is none of those known."""
    if offload not in (None, "activations"):
        hint = ": of optimizers torch offloads those of fully_shard alone" if offload == "optimizer" else ""
        raise ConfigError(f"offload={offload!r} is not 'activations'{hint}; give that, or leave offload= out")


def _check_reduction(reduction: object) -> None:
    """Raise `ConfigError` for a `reduction=` that is neither a known name nor a function."""
    if reduction is not None and reduction not in CHOICES and not callable(reduction):
        hint = " (over rows, or over tokens?)" if reduction == "mean" else ""
        raise ConfigError(
            f"reduction={reduction!r}{hint} is none of {', '.join(map(repr, CHOICES))}, and no function that "
            "returns a microbatch's weight"
        )
