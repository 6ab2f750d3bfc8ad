"""A run as its ranks are sent it: what flags and configuration say, filled in for this machine."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenflow import demo
from evenflow.cli.config import (
    DataChoice,
    ExampleData,
    FolderModel,
    FunctionModel,
    Pipelining,
    RunConfig,
    TextData,
)
from evenflow.cli.config_file import read_config
from evenflow.cli.run_logs import check_logs
from evenflow.errors import ConfigError
from evenflow.foreign import file_in_the_way
from evenflow.journal.folder import CONFIG, has_ended, is_free, read_run
from evenflow.launcher import rank_environment
from evenflow.pipe.given.cuts import stages_on_each
from evenflow.pipe.given.planned import DEFAULT_SCHEDULE
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import read_plan_file
from evenflow.schedules import catalog

_NUM_CPU_RANKS = 2


@dataclass(frozen=True, slots=True)
class Flags:
    """What a command that takes a model was told, over what the configuration says; None: nothing."""

    source: str | None = None
    model: Path | None = None
    demo: bool = False
    data: Sequence[Path] = ()
    steps: int | None = None
    batch_size: int | None = None
    length: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    stages: int | None = None
    stages_per_rank: int | None = None
    schedule: str | None = None
    num_microbatches: int | None = None
    out: Path | None = None
    resume: Path | None = None
    save_every: int | None = None
    keep_last: int | None = None
    max_restarts: int = 0
    plan: Path | None = None
    exact: bool | None = None
    device: str | None = None
    bad_numbers: str | None = None
    find_nan: bool | None = None
    timeout: float | None = None
    log_json: Path | None = None
    tensorboard: bool | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A run as each rank is sent it: nothing is left open but what the ranks are to plan (`plans_itself`)."""

    config: RunConfig
    schedule: str
    num_stages: int
    stages_per_rank: int
    num_ranks: int
    device: str
    out: Path
    plan: Plan | None = None

    @property
    def saves(self) -> bool:
        """Whether it saves while it trains: then its folder is `out`, from the beginning."""
        return self.config.checkpoints.every is not None

    @property
    def mesh(self) -> dict[str, int]:
        """How many ranks of each kind there are; a plan says it, where there is one."""
        given = self.config.pipeline
        beside = (given.data_ranks, given.tensor_ranks)
        if self.plan is not None:
            beside = (self.plan.degrees.data, self.plan.degrees.tensor)
        return {"pp": self.num_ranks, "dp": beside[0], "tp": beside[1]}

    @property
    def num_processes(self) -> int:
        """How many processes train."""
        return math.prod(self.mesh.values())

    @property
    def plans_itself(self) -> bool:
        """Whether several ranks are told nothing of the pipeline: they measure the model, and plan it."""
        nothing = Pipelining(timeout=self.config.pipeline.timeout)  # which decides nothing
        return self.plan is None and self.config.pipeline == nothing and self.num_ranks > 1


def make_job(flags: Flags) -> Job:
    """Merge flags and configuration, and fill in what depends on the machine.

    Raises:
        ConfigError: The first thing found that cannot work, of what needs no model to be known.
    """
    plan = None if flags.plan is None else read_plan_file(flags.plan)
    config = _overridden(_config(flags), flags)
    _check_saving(config, flags)
    check_logs(config.logs)
    if plan is None:
        schedule = config.pipeline.schedule or DEFAULT_SCHEDULE
        catalog.get(schedule)  # an unknown one is refused here, with the list
    else:
        config, schedule = _planned(config, plan, flags), plan.schedule
    device = _device(flags.device)
    on_each = stages_on_each(config.pipeline.stages_per_rank, schedule)
    num_stages = _num_stages(config.pipeline, device, on_each)
    num_ranks = max(1, num_stages // on_each)
    out = flags.resume or flags.out or Path("runs") / config.name
    _check_out(out, asked=flags.out is not None)
    job = Job(
        config=config,
        schedule=schedule,
        num_stages=num_stages,
        stages_per_rank=on_each,
        num_ranks=num_ranks,
        device=device,
        out=out,
        plan=plan,
    )
    # Under torchrun there may be more hosts than this.
    if device == "cuda" and rank_environment() is None and job.num_processes > torch.cuda.device_count():
        each = job.num_processes // num_ranks
        beside = f", {each} times," if each > 1 else ""
        raise ConfigError(
            f"{num_stages} stages on CUDA, {on_each} on each device{beside}, need {job.num_processes} devices"
            f", and this machine has {torch.cuda.device_count()}: lower --stages, or use --device cpu"
        )
    return job


def _check_saving(config: RunConfig, flags: Flags) -> None:
    if flags.max_restarts < 0:
        raise ConfigError(f"--max-restarts {flags.max_restarts}: it is a number of times")
    if flags.resume is not None and flags.out is not None:
        raise ConfigError("--resume and --out both name the run's folder: leave one out")
    for name, asked in (
        ("--resume", flags.resume is not None),
        ("--max-restarts", flags.max_restarts > 0),
        ("bad_numbers = rollback", config.training.bad_numbers == "rollback"),
    ):
        if asked and config.checkpoints.every is None:
            raise ConfigError(
                f"{name} needs checkpoints, and this run saves none: say --save-every STEPS, or every under "
                "[checkpoints]"
            )
    num_steps, folder = config.training.steps, flags.resume
    if folder is not None and has_ended(folder) and read_run(folder).num_steps >= num_steps:
        raise ConfigError(
            f"--resume {folder}: the run in it has ended, after {num_steps} steps; ask for more with --steps"
        )


def _planned(config: RunConfig, plan: Plan, flags: Flags) -> RunConfig:
    """The run with a plan in the place of what its configuration says of the pipeline."""
    given = {
        "stages": flags.stages,
        "stages-per-rank": flags.stages_per_rank,
        "schedule": flags.schedule,
        "microbatches": flags.num_microbatches,
    }
    for name in _given(given):
        raise ConfigError(f"--{name} and --plan are both given, and a plan decides that: leave one out")
    said = config.pipeline
    if (said.data_ranks, said.tensor_ranks, said.shard) != (1, 1, None):
        raise ConfigError(
            "data_ranks, tensor_ranks or shard under [pipeline] and --plan are both given, and a plan "
            "decides that: leave one out"
        )
    pipeline = Pipelining(
        stages=len(plan.stages),
        stages_per_rank=plan.stages_per_rank,
        schedule=None if plan.order else plan.schedule,  # the run's folder has the plan as well
        microbatch_size=plan.microbatch_size,
        exact=config.pipeline.exact,
        link=config.pipeline.link,
        compile=config.pipeline.compile,
        offload=config.pipeline.offload,
        timeout=config.pipeline.timeout,
    )
    return dataclasses.replace(config, pipeline=pipeline)


def _config(flags: Flags) -> RunConfig:
    """The run that the source names, before the other flags."""
    if flags.demo:
        return _demo(flags)
    match flags.source, flags.model:
        case None, None if flags.resume is not None and (flags.resume / CONFIG).is_file():
            return read_config(flags.resume / CONFIG)
        case None, None:
            raise ConfigError(
                "no model is given: name a CONFIG.toml or MODULE:FUNCTION, or give --model FOLDER (evenflow "
                "train has one of its own too: --demo)"
            )
        case None, Path() as folder:
            return RunConfig(name=folder.resolve().name, model=FolderModel(folder), data=TextData())
        case str(source), model if source.endswith(".toml"):
            config = read_config(Path(source))
            if model is None:
                return config
            text = config.data if isinstance(config.data, TextData) else TextData()
            return dataclasses.replace(config, model=FolderModel(model), data=text)
        case str(source), None:
            function = source.rpartition(":")[2]
            return RunConfig(name=_file_name(function), model=FunctionModel(source), data=ExampleData())
        case source, model:
            raise ConfigError(f"two models are given, {source} and --model {model}: leave one out")


def _demo(flags: Flags) -> RunConfig:
    if flags.source is not None or flags.model is not None:
        other = flags.source or f"--model {flags.model}"
        raise ConfigError(f"--demo trains a model of its own, and {other} names another: leave one out")
    return read_config(demo.CONFIG)


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name) or "run"


def _overridden(config: RunConfig, flags: Flags) -> RunConfig:
    training = {
        "steps": flags.steps,
        "learning_rate": flags.learning_rate,
        "seed": flags.seed,
        "bad_numbers": flags.bad_numbers,
        "find_nan": flags.find_nan,
    }
    pipeline = {
        "stages": flags.stages,
        "stages_per_rank": flags.stages_per_rank,
        "schedule": flags.schedule,
        "exact": flags.exact,
        "timeout": flags.timeout,
    }
    return dataclasses.replace(
        config,
        data=_overridden_data(config.data, flags),
        training=dataclasses.replace(config.training, **_given(training)),
        pipeline=_with_microbatches(dataclasses.replace(config.pipeline, **_given(pipeline)), flags),
        checkpoints=dataclasses.replace(
            config.checkpoints, **_given({"every": flags.save_every, "keep_last": flags.keep_last})
        ),
        logs=dataclasses.replace(
            config.logs, **_given({"json": flags.log_json, "tensorboard": flags.tensorboard})
        ),
    )


def _with_microbatches(pipeline: Pipelining, flags: Flags) -> Pipelining:
    if flags.num_microbatches is None:
        return pipeline
    # The flag takes the place of either way in which the file may have said it.
    return dataclasses.replace(pipeline, num_microbatches=flags.num_microbatches, microbatch_size=None)


def _overridden_data(data: DataChoice, flags: Flags) -> DataChoice:
    sizes = _given({"batch_size": flags.batch_size, "length": flags.length})
    match data:
        case ExampleData():
            if flags.data:
                return dataclasses.replace(TextData(paths=tuple(flags.data)), **sizes)
            if sizes:
                name = next(iter(sizes)).replace("_", "-")
                raise ConfigError(
                    f"--{name} shapes batches of text, and this run has none: its only batch is the example "
                    "that the model's function returns; add --data FILE_OR_FOLDER"
                )
            return data
        case TextData():
            return dataclasses.replace(data, paths=tuple(flags.data) or data.paths, **sizes)


# `Any`: the values have the types of the fields that they will fill, which a dict cannot say.
def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _device(asked: str | None) -> str:
    match asked:
        case None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        case "cpu":
            return "cpu"
        case "cuda" if torch.cuda.is_available():
            return "cuda"
        case "cuda":
            built = torch.version.cuda
            reason = "finds no CUDA device" if built else "was built without CUDA"
            raise ConfigError(
                f"--device cuda: torch {torch.__version__} {reason}; use --device cpu, or install a CUDA "
                "build on a machine with a GPU"
            )
        case _:
            raise ConfigError(f"--device {asked}: there are cpu and cuda")


def _num_stages(pipeline: Pipelining, device: str, stages_per_rank: int) -> int:
    if pipeline.stages is not None:
        return pipeline.stages
    if pipeline.split:
        return len(pipeline.split) + 1
    if (launched := rank_environment()) is not None:
        num_processes = launched.num_ranks
    elif device == "cuda":
        num_processes = torch.cuda.device_count()
    else:
        return _NUM_CPU_RANKS * stages_per_rank
    return max(1, num_processes // (pipeline.data_ranks * pipeline.tensor_ranks)) * stages_per_rank


def _check_out(out: Path, *, asked: bool) -> None:
    if (found := file_in_the_way(out)) is not None:
        raise ConfigError(f"cannot write the run to {out}: {found} is a file, not a folder")
    if asked and not is_free(out):
        raise ConfigError(
            f"--out {out} holds something already: name a folder that is not there yet, or is empty; without "
            "--out a run finds a name of its own"
        )
