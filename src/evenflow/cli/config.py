"""What a run is: the model, the data, the training and the pipeline, as one value read from TOML or flags.

Every number is checked where it enters, by the class that holds it, so that a wrong one stops the command
before a process starts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, get_args

from evenflow.errors import ConfigError
from evenflow.interop import loggers
from evenflow.pipe.checkpoints import OnError
from evenflow.plan.choice import RECOMPUTE_NAMES


@dataclass(frozen=True, slots=True)
class FunctionModel:
    """A model built by a function: `MODULE:FUNCTION` or `FILE.py:FUNCTION`, called with `arguments`."""

    reference: str
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FolderModel:
    """A causal language model and its tokenizer in a Hugging Face folder."""

    folder: Path


ModelChoice: TypeAlias = FunctionModel | FolderModel


@dataclass(frozen=True, slots=True)
class ExampleData:
    """No data of its own: every step gets the example batch that came with the model."""


_MOST_TOKENS = 2**28  # of a batch, which is made whole: 2 GiB of numbers


@dataclass(frozen=True, slots=True)
class TextData:
    """Text, cut into random windows. Without `paths` it is the documentation that ships inside CPython.

    `batch_size` sequences of `length` tokens make a batch; the last `held_out` share (0 to 1) of the text
    is never trained on.
    """

    paths: tuple[Path, ...] = ()
    batch_size: int = 16
    length: int = 128
    held_out: float = 0.1

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.length", self.length, 2)
        _between("data.held_out", self.held_out, 0.01, 0.5)
        if self.batch_size * self.length > _MOST_TOKENS:
            raise ConfigError(
                f"data.batch_size = {self.batch_size} and data.length = {self.length} make a batch of "
                f"{self.batch_size * self.length:,} tokens; it can have {_MOST_TOKENS:,}"
            )


DataChoice: TypeAlias = ExampleData | TextData


# What can become of a step with bad numbers, and what a pipeline does for it; of a rollback the first half.
BAD_NUMBERS = {"stop": "stop", "skip": "skip", "rollback": "stop", "ignore": None}


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how fast: AdamW, a linear warm-up, then a cosine down to a tenth of the rate.

    `precision`, `clip_norm` and `find_nan` are those of `evenflow.pipeline`, and so is `bad_numbers`: stop,
    skip, or ignore; with rollback a run goes on from its last checkpoint, with the batches behind.
    """

    steps: int = 500
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0
    validate_every: int = 250
    precision: str | None = None
    clip_norm: float | None = None
    bad_numbers: str = "stop"
    find_nan: bool = False

    def __post_init__(self) -> None:
        _at_least("training.steps", self.steps, 1)
        _between("training.learning_rate", self.learning_rate, 1e-12, 100.0)
        _at_least("training.warmup_steps", self.warmup_steps, 0)
        _between("training.weight_decay", self.weight_decay, 0.0, 100.0)
        _at_least("training.seed", self.seed, 0)
        _at_least("training.validate_every", self.validate_every, 1)
        if self.clip_norm is not None:
            _between("training.clip_norm", self.clip_norm, 1e-12, math.inf)
        if self.bad_numbers not in BAD_NUMBERS:
            known = " or ".join(map(repr, BAD_NUMBERS))
            raise ConfigError(f"training.bad_numbers = {self.bad_numbers!r} must be {known}")
        if self.find_nan and self.bad_numbers == "ignore":
            raise ConfigError(
                "training.find_nan looks for bad numbers, and training.bad_numbers = 'ignore' wants to hear "
                "of none: leave one out"
            )


@dataclass(frozen=True, slots=True)
class Pipelining:
    """How the model is cut and fed.

    `stages=None`: as many as `split` makes, or those of one rank per GPU, or of two on a machine without.
    `stages_per_rank=None`: what suits the schedule, 2 for those that interleave or make a V, else 1.
    `schedule=None`: 1f1b. Where all are left out, several ranks measure the model and plan it. `link` is how
    tensors travel between ranks: auto, shared-memory or torch. `compile` lets torch.compile have the blocks.
    `recompute`: none, selective, full, or a list of modules' names; `offload`: activations, or left out.
    There are `data_ranks` times `tensor_ranks` of each rank of the pipeline, each a process; `shard` is what
    data ranks share: zero1 or fsdp. `timeout`: for how many seconds a rank waits for one that does not move.
    """

    stages: int | None = None
    stages_per_rank: int | None = None
    schedule: str | None = None
    num_microbatches: int | None = None
    microbatch_size: int | None = None
    split: tuple[str, ...] = ()
    exact: bool = False
    link: str = "auto"
    compile: bool = False
    recompute: str | tuple[str, ...] | None = None
    offload: str | None = None
    data_ranks: int = 1
    tensor_ranks: int = 1
    shard: str | None = None
    timeout: float = 300.0

    def __post_init__(self) -> None:
        _between("pipeline.timeout", self.timeout, 1e-3, 1e9)
        counts = (
            "stages",
            "stages_per_rank",
            "num_microbatches",
            "microbatch_size",
            "data_ranks",
            "tensor_ranks",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None:
                _at_least(f"pipeline.{name}", value, 1)
        for name, value, known in (
            ("recompute", self.recompute, RECOMPUTE_NAMES),
            ("offload", self.offload, ("activations",)),
            ("shard", self.shard, ("zero1", "fsdp")),
        ):
            if isinstance(value, str) and value not in known:
                listed = "; modules are named in a list" if name == "recompute" else ""
                raise ConfigError(
                    f"pipeline.{name} = {value!r} must be {' or '.join(map(repr, known))}{listed}"
                )
        if self.num_microbatches is not None and self.microbatch_size is not None:
            raise ConfigError(
                f"pipeline.num_microbatches = {self.num_microbatches} and pipeline.microbatch_size = "
                f"{self.microbatch_size} are both given: each follows from the other, so leave one out"
            )


@dataclass(frozen=True, slots=True)
class Saving:
    """Checkpoints while a run trains: every so many steps, by default none; the `keep_last` newest stay.

    `on_error`: where one cannot be written, "continue" warns and trains on, "stop" ends the run.
    """

    every: int | None = None
    keep_last: int = 2
    on_error: OnError = "continue"

    def __post_init__(self) -> None:
        if self.every is not None:
            _at_least("checkpoints.every", self.every, 1)
        _at_least("checkpoints.keep_last", self.keep_last, 1)
        if self.on_error not in get_args(OnError):
            raise ConfigError(f"checkpoints.on_error = {self.on_error!r} must be 'continue' or 'stop'")


STDOUT = Path(loggers.STDOUT)


@dataclass(frozen=True, slots=True)
class Logging:
    """What is written of each step while a run trains.

    `json`: a file that gets a line of JSON for each, "-" for the standard output. `tensorboard`: curves, in
    the run's own folder.
    """

    json: Path | None = None
    tensorboard: bool = False


@dataclass(frozen=True, slots=True)
class RunConfig:
    """All that `evenflow train` needs to know; `name` is that of the run and of its folder under runs/."""

    name: str
    model: ModelChoice
    data: DataChoice
    training: Training = field(default_factory=Training)
    pipeline: Pipelining = field(default_factory=Pipelining)
    checkpoints: Saving = field(default_factory=Saving)
    logs: Logging = field(default_factory=Logging)


def _at_least(place: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{place} = {value} must be at least {least}")


def _between(place: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{place} = {value} must lie between {least} and {most}")
