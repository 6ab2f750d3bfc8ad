"""The training run itself, as each rank executes it.

Every rank runs this same loop; the pipeline decides what a call means on this rank, and only the main
rank's console speaks.
"""

import contextlib
import dataclasses
import itertools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import evenflow
from evenflow.cli.config import DataChoice, ExampleData, Logging, Pipelining, RunConfig, TextData, Training
from evenflow.cli.config_text import write_config
from evenflow.cli.keeping import Keeping, check_left
from evenflow.cli.logged import logged_status
from evenflow.cli.report import Summary, Units, print_cut
from evenflow.cli.run_logs import console_of, json_hook, user_output
from evenflow.cli.source import ModelSource, build
from evenflow.cli.step_log import StepLog
from evenflow.cli.text import held_out_batches, make_corpus, read_text, training_batches
from evenflow.errors import BadNumbersError, ConfigError, EvenflowError
from evenflow.interop.progress import ProgressReport
from evenflow.journal.folder import claim, write_run
from evenflow.pipe.places import world_of
from evenflow.plan.plan import Plan
from evenflow.plan.planner import describe
from evenflow.plan.request import choice_of
from evenflow.view.bill_table import bill_table
from evenflow.view.picture import draw_timelines
from evenflow.view.units import format_seconds

# Reading a loss waits for the device, so it is read only now and then.
_READ_EVERY = 10
# The last training loss is the mean of so many steps, because one batch's is noisy.
_NUM_LAST_LOSSES = 20
_FINAL_RATE = 0.1
# What a pipeline does with bad numbers; of a rollback the first half.
_POLICIES = {"stop": "stop", "skip": "skip", "rollback": "stop", "ignore": None}


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
        given = dataclasses.replace(
            self.config.pipeline, timeout=Pipelining().timeout
        )  # which decides nothing
        return self.plan is None and given == Pipelining() and self.num_ranks > 1


@dataclass(frozen=True, slots=True, eq=False)  # batches have no equality
class Feed:
    """The batches of a run; `loss_scale` turns the model's loss into the units of the validation loss."""

    batches: Iterable[Any]  # the user's batches: any tree
    validation: Sequence[Any]
    units: Units
    loss_scale: float


def run_rank(job: Job) -> None:
    """Train as one rank of `job`: print the cut and the progress, validate, write the run's folder.

    Raises:
        EvenflowError: The model, the data or the pipeline cannot work as given, or another rank is lost.
    """
    json = json_hook(job.config.logs)  # before anything else is told to leave the standard output alone
    with user_output(job.config.logs):
        if job.plans_itself:
            is_main = world_of(job.device, job.config.pipeline.timeout).rank == 0
            with logged_status(console_of(job.config.logs, is_main=is_main), "recording the model"):
                pipe, feed = _prepare(job, {}, device=job.device, compiles=job.config.pipeline.compile)
        else:
            pipe, feed = _prepare(job, _levers(job), device=job.device, compiles=job.config.pipeline.compile)
        try:
            if json is not None:
                pipe.log_to(json)
            _train(pipe, feed, job)
        finally:
            pipe.close()


def prepare_here(job: Job) -> tuple["evenflow.Pipeline", Feed]:
    """Do all that the ranks do before their first step, in this process and on the CPU.

    What is wrong with the model, the data or the cut is then said once, before any process starts. The
    pipeline is to be closed.

    Raises:
        EvenflowError: What is wrong. An exception of the model's own code comes as a `ConfigError` whose
            note is its traceback.
    """
    levers = _levers(job)
    if job.plan is not None:  # here is one process, of one pipeline
        degrees = dataclasses.replace(job.plan.degrees, data=1, tensor=1, sharding="none")
        levers["plan"] = dataclasses.replace(job.plan, degrees=degrees)
    levers |= dict.fromkeys(("mesh", "shard"))
    with refusing("the model cannot be built and run"):
        return _prepare(job, levers, device="cpu")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an exception of the user's code into a `ConfigError` that says `what` and has its traceback."""
    try:
        yield
    except EvenflowError:
        raise
    except Exception as error:
        refusal = ConfigError(f"{what}: {type(error).__name__}: {error}")
        refusal.add_note("".join(traceback.format_exception(error)).rstrip())
        raise refusal from error


# levers: arguments of `pipeline`, whose values have many types.
def _prepare(
    job: Job, levers: dict[str, Any], *, device: str, compiles: bool = False
) -> tuple["evenflow.Pipeline", Feed]:
    config = job.config
    source = build(config.model, seed=config.training.seed)
    feed = make_feed(config.data, source, config.training)
    pipe = evenflow.pipeline(
        source.model,
        loss=source.loss,
        example=feed.validation[0],
        optimizer=make_optimizer(config.training),
        scheduler=_warmup_then_cosine(config.training),
        **levers,
        exact=config.pipeline.exact,
        link=config.pipeline.link,
        compile=compiles,
        offload=config.pipeline.offload,
        precision=config.training.precision,
        clip_norm=config.training.clip_norm,
        bad_numbers=_POLICIES[config.training.bad_numbers],
        find_nan=config.training.find_nan,
        seed=config.training.seed,
        device=device,
        timeout=config.pipeline.timeout,
    )
    return pipe, feed


def make_optimizer(training: Training) -> Callable[[Any], torch.optim.Optimizer]:
    """What makes the optimizer of some named parameters."""
    return lambda named_parameters: torch.optim.AdamW(
        named_parameters,
        lr=training.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=training.weight_decay,
    )


# `Any`: the values have the types of the arguments that they are, which a dict cannot say.
def _levers(job: Job) -> dict[str, Any]:
    """What decides the cut and the schedule, as `evenflow.pipeline` takes it."""
    if job.plan is not None:
        return {"plan": job.plan}
    given = job.config.pipeline
    return {
        "stages": job.num_stages,
        "stages_per_rank": job.stages_per_rank,
        "schedule": job.schedule,
        "microbatch_size": given.microbatch_size,
        "num_microbatches": given.num_microbatches,
        "split": given.split or None,
        "recompute": given.recompute,
        "mesh": job.mesh if job.num_processes > job.num_ranks else None,
        "shard": given.shard,
    }


def _train(pipe: "evenflow.Pipeline", feed: Feed, job: Job) -> None:
    console = console_of(job.config.logs, is_main=pipe.is_main)
    if job.plans_itself and pipe.plan is not None:
        chosen, seconds = describe(choice_of(pipe.plan)), pipe.plan.prediction.step_seconds
        console.print(
            f"planned: {chosen}; {format_seconds(seconds)} a step expected", soft_wrap=True, highlight=False
        )
    print_cut(console, pipe.cut)
    training = job.config.training
    log = StepLog(pipe, num_steps=training.steps, device=job.device)
    folder = _folder(pipe, job) if job.saves or job.config.logs.tensorboard is True else None
    _log_curves(pipe, job.config.logs, folder)
    keeping = Keeping(pipe, job.out, job.config) if job.saves else None
    before = None if keeping is None else keeping.resume(console)
    if before is not None:
        log.go_on(before)
        check_left(job.out, log.num_steps, training.steps)
    number = log.num_steps  # of batches: those left out make no update, and a rollback makes some again
    with ProgressReport(console, num_steps=training.steps, num_made=number) as report:
        pipe.log_to(
            lambda _, numbers: report(number, numbers),
            every=lambda _: _is_shown(training, number),
            all_ranks=True,
        )
        if before is None:
            report.line(f"before training: validation {_validate(pipe, feed):.3f} {feed.units.loss}")
        for number, batch in enumerate(log.batches(feed.batches), start=log.num_steps + 1):
            try:
                log.step(batch)
            except BadNumbersError as error:
                if keeping is None or training.bad_numbers != "rollback":
                    raise
                report.line(keeping.roll_back(error))
                continue
            if keeping is not None and number < training.steps:  # the last one is saved at the end
                keeping.updated(log.state)
            if number % training.validate_every == 0 and number < training.steps:
                report.line(f"step {number}: validation {_validate(pipe, feed):.3f} {feed.units.loss}")
        report.reached(number)
    if keeping is not None:
        keeping.close()
    # Before the last validation, which would be the last step.
    last_step = pipe.last_step()
    measured = last_step.measured_timeline
    console.print(bill_table(last_step.predicted_bills, last_step.measured_bills))
    schedule = job.schedule if pipe.plan is None else pipe.plan.schedule
    run, steps = log.finish(job.config.name, schedule, feed.units)
    last_losses = log.last_losses(_NUM_LAST_LOSSES)
    summary = Summary(
        first_loss=log.losses[0],
        last_loss=math.fsum(last_losses) / len(last_losses),
        validation_loss=_validate(pipe, feed),
        items_per_second=run.items_per_second,
        step_seconds=run.step.median,
        bubble=math.fsum(rank.idle for rank in run.ranks) / len(run.ranks),
    )
    folder = folder or _folder(pipe, job)
    pipe.save(folder / "checkpoint")
    if pipe.is_main:
        title = f"{job.config.name}: {schedule}, {len(pipe.cut)} stages"
        draw_timelines(
            folder / "timeline.png", predicted=last_step.predicted_timeline, measured=measured, title=title
        )
        write_run(folder, run, steps, last_step=last_step, plan=pipe.plan, config=write_config(job.config))
    report.line(f"wrote {folder} (look at it with: evenflow show {folder})")
    report.line(summary.line(feed.units))


def _is_shown(training: Training, number: int) -> bool:
    """Whether the progress tells of a step."""
    every = (_READ_EVERY, training.validate_every)
    return number in (1, training.steps) or any(number % each == 0 for each in every)


def _folder(pipe: "evenflow.Pipeline", job: Job) -> Path:
    """The run's folder, which is there from now on; a collective call."""
    folder: Path = pipe.share((job.out if job.saves else claim(job.out)) if pipe.is_main else None)
    return folder


def _log_curves(pipe: "evenflow.Pipeline", logs: Logging, folder: Path | None) -> None:
    match logs.tensorboard:
        case False:
            return
        case True:
            assert folder is not None, "it was made for them"
            pipe.log_to(evenflow.log_to_tensorboard(folder / "tensorboard"))
        case Path() as named:
            pipe.log_to(evenflow.log_to_tensorboard(named))


def _validate(pipe: "evenflow.Pipeline", feed: Feed) -> float:
    """The mean loss over the held-out batches, in the units of `feed`."""
    return feed.loss_scale * float(pipe.evaluate_all(feed.validation).loss)


def make_feed(data: DataChoice, source: ModelSource, training: Training) -> Feed:
    """The batches that a run trains on and validates with.

    Raises:
        ConfigError: There is not enough text, or none.
    """
    match data:
        case ExampleData():
            num_rows = max(
                (leaf.shape[0] for leaf in pytree.tree_leaves(source.example) if _has_rows(leaf)), default=1
            )
            return Feed(
                batches=itertools.repeat(source.example, training.steps),
                validation=[source.example],
                units=Units(item="samples", num_items_per_batch=num_rows, loss="loss (on the same batch)"),
                loss_scale=1.0,
            )
        case TextData():
            corpus = make_corpus(
                read_text(data.paths), tokenize=source.tokenize, held_out=data.held_out, length=data.length
            )
            return Feed(
                batches=training_batches(
                    corpus,
                    batch_size=data.batch_size,
                    length=data.length,
                    seed=training.seed,
                    num_batches=training.steps,
                ),
                validation=held_out_batches(corpus, batch_size=data.batch_size, length=data.length),
                units=Units(item="tok", num_items_per_batch=data.batch_size * data.length, loss="nats/byte"),
                loss_scale=1 / corpus.bytes_per_token,
            )


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def _warmup_then_cosine(
    training: Training,
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    def factor(step: int) -> float:
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
        return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
