"""What a run is: the model, the data, the training and the pipeline, as one value read from TOML or flags.

Every number is checked where it enters, by the class that holds it, so that a wrong one stops the command
before a process starts.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_origin

from evenflow.cli.config_keys import check_keys
from evenflow.errors import ConfigError
from evenflow.foreign import is_file_name, read_toml, shown
from evenflow.interop import loggers
from evenflow.pipe.checkpoints import OnError
from evenflow.plan.request import RECOMPUTE_NAMES


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


_SECTIONS = {
    "data": TextData,
    "training": Training,
    "pipeline": Pipelining,
    "checkpoints": Saving,
    "logs": Logging,
}
# Of each table of the TOML; the top level's under "".
_KNOWN_KEYS = {
    "": ("name", "model", *_SECTIONS),
    "model": ("function", "arguments", "folder"),
    **{name: tuple(each.name for each in fields(kind)) for name, kind in _SECTIONS.items()},
}


def read_config(path: Path) -> RunConfig:
    """Read a run from a TOML file. Paths inside it count from the file's own folder.

    Raises:
        ConfigError: The file cannot be read or is no TOML; a key is unknown (the nearest known one is
            suggested), has the wrong type or lies out of its range; the model is missing.

    Example:
        >>> read_config(Path("examples/train_gpt.toml")).name  # doctest: +SKIP
        'train_gpt'
    """
    content = read_toml(path, "configuration")
    try:
        check_keys(content, _KNOWN_KEYS)
        return RunConfig(
            name=_name(content.get("name", path.stem)),
            model=_model(content.get("model"), path.parent),
            data=_data(content.get("data"), path.parent),
            training=_section(Training, content.get("training", {}), "training"),
            pipeline=_section(Pipelining, content.get("pipeline", {}), "pipeline"),
            checkpoints=_section(Saving, content.get("checkpoints", {}), "checkpoints"),
            logs=_logs(content.get("logs", {}), path.parent),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _name(value: object) -> str:
    name = _convert(value, str, "name")
    assert isinstance(name, str), "converted"
    if not is_file_name(name):
        raise ConfigError(
            f"name = {shown(name)} names a folder under runs/, so it cannot be empty, or '..', or hold a "
            "slash or control characters"
        )
    return name


def _model(table: object, folder: Path) -> ModelChoice:
    match table:
        case {"function": str(reference), **rest} if "folder" not in rest:
            arguments = rest.get("arguments", {})
            if not isinstance(arguments, dict):
                raise ConfigError(
                    f"model.arguments = {shown(arguments)} must be a table of the function's arguments"
                )
            return FunctionModel(_from_folder(reference, folder), arguments)
        case {"folder": str(path), **rest} if not rest:
            return FolderModel(folder / path)
        case _:
            raise ConfigError(
                '[model] must say which model to train: either function = "FILE.py:FUNCTION" (or '
                '"MODULE:FUNCTION"), with its arguments if it takes any, or folder = "a Hugging Face folder"'
            )


def _from_folder(reference: str, folder: Path) -> str:
    """A `FILE.py:FUNCTION` of a configuration file counts from that file's folder."""
    place, colon, function = reference.rpartition(":")
    return f"{folder / place}{colon}{function}" if place.endswith(".py") else reference


def _data(table: object, folder: Path) -> DataChoice:
    if table is None:
        return ExampleData()
    data = _section(TextData, table, "data")
    return replace(data, paths=tuple(folder / path for path in data.paths))


def _logs(table: object, folder: Path) -> Logging:
    said = _section(Logging, table, "logs")
    return said if said.json in (None, STDOUT) else replace(said, json=folder / said.json)


S = TypeVar("S")
_LARGEST_WHOLE = 2**63 - 1


def _section(kind: type[S], table: object, place: str) -> S:
    """Build one of the dataclasses from its table, whose keys have been checked."""
    assert isinstance(table, dict), "checked with the keys"
    hints = typing.get_type_hints(kind)
    return kind(**{key: _convert(value, hints[key], f"{place}.{key}") for key, value in table.items()})


# The hint is a type, a union or a generic alias: `Any`, because Python has no common type for these.
def _convert(value: object, hint: Any, place: str) -> object:
    """The TOML value as the field's type; the reason where it cannot be."""
    if isinstance(hint, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        fitting = [option for option in options if (get_origin(option) is tuple) == isinstance(value, list)]
        hint = (fitting or options)[0]
    if get_origin(hint) is Literal:
        hint = str  # the dataclass says which
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        if not isinstance(value, list):
            raise ConfigError(f"{place} = {shown(value)} must be a list, in square brackets")
        return tuple(_convert(each, element, place) for each in value)
    # In Python a bool is an int; in a configuration it is a mistake.
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        raise ConfigError(f"{place} = {shown(value)} must lie between -{_LARGEST_WHOLE} and {_LARGEST_WHOLE}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    names = {int: "a whole number", float: "a number", str: "a string", Path: "a path", bool: "true or false"}
    raise ConfigError(f"{place} = {shown(value)} must be {names[hint]}")


def _at_least(place: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{place} = {value} must be at least {least}")


def _between(place: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{place} = {value} must lie between {least} and {most}")
