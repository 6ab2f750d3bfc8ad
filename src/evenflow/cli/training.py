"""The training run itself, as each rank executes it.

Every rank runs this same loop; the pipeline decides what a call means on this rank, and only the main
rank's console speaks.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import evenflow
from evenflow.cli.config import BAD_NUMBERS, RunConfig, Training
from evenflow.cli.config_file import write_config
from evenflow.cli.feed import Feed, make_feed
from evenflow.cli.job import Job
from evenflow.cli.printing import print_line
from evenflow.cli.report import bill_table, last_line, print_cut
from evenflow.cli.run_logs import console_of, json_hook, logged_status, user_output
from evenflow.cli.source import build, refusing
from evenflow.cli.step_log import StepLog
from evenflow.errors import BadNumbersError, ConfigError
from evenflow.interop.progress import ProgressReport
from evenflow.journal.folder import (
    CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    PICTURE,
    claim,
    write_run,
    write_text,
)
from evenflow.journal.page import draw_last_step
from evenflow.pipe.given.places import world_of
from evenflow.plan.choice import describe
from evenflow.view.units import format_seconds

# Reading a loss waits for the device, so it is read only now and then.
_READ_EVERY = 10
_FINAL_RATE = 0.1


def run_rank(job: Job) -> None:
    """Train as one rank of `job`: print the cut and the progress, validate, write the run's folder.

    Raises:
        EvenflowError: The model, the data or the pipeline cannot work as given, or another rank is lost.
    """
    logs, pipeline = job.config.logs, job.config.pipeline
    json = json_hook(logs)  # before anything else is told to leave the standard output alone
    with user_output(logs):
        status: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if job.plans_itself:
            is_main = world_of(job.device, pipeline.timeout).rank == 0
            status = logged_status(console_of(logs, is_main=is_main), "recording the model")
        levers = {} if job.plans_itself else _levers(job)
        with status:
            pipe, feed = _prepare(job, levers, device=job.device, compiles=pipeline.compile)
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
        return _prepare(job, levers, device="cpu", compiles=False)


# levers: arguments of `pipeline`, whose values have many types.
def _prepare(
    job: Job, levers: dict[str, Any], *, device: str, compiles: bool
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
        bad_numbers=BAD_NUMBERS[config.training.bad_numbers],
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
    console, training = console_of(job.config.logs, is_main=pipe.is_main), job.config.training
    if job.plans_itself and pipe.plan is not None:
        chosen, seconds = describe(pipe.plan.choice), pipe.plan.prediction.step_seconds
        print_line(console, f"planned: {chosen}; {format_seconds(seconds)} a step expected")
    print_cut(console, pipe.cut)
    log = StepLog(pipe, num_steps=training.steps, device=job.device)
    folder = _folder(pipe, job) if job.saves or job.config.logs.tensorboard else None
    if folder is not None and job.config.logs.tensorboard:
        pipe.log_to(evenflow.log_to_tensorboard(folder / CURVES))
    checkpoints = _make_checkpoints(pipe, job.out, job.config) if job.saves else None
    if checkpoints is not None and (found := checkpoints.resume()) is not None:
        print_line(console, f"going on from {found}")
        if checkpoints.extra is not None:  # else it is none of a run's, but weights to begin with
            log.go_on(checkpoints.extra)
        if log.num_steps >= training.steps:
            raise ConfigError(
                f"--resume {job.out}: {log.num_steps} steps are made, and {training.steps} are asked for; "
                "ask for more with --steps"
            )
    _make_steps(pipe, feed, job, log, checkpoints, console)
    if checkpoints is not None:
        checkpoints.close()
    _end(pipe, feed, job, log, folder, console)


def _make_checkpoints(pipe: "evenflow.Pipeline", folder: Path, config: RunConfig) -> evenflow.Checkpoints:
    """What saves a run and goes on with it, on every rank; its folder is there from now on."""
    said = config.checkpoints
    assert said.every is not None, "checked before the ranks start"
    if pipe.is_main and not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, write_config(config))
    return evenflow.Checkpoints(
        pipe, folder / CHECKPOINTS, every=said.every, keep_last=said.keep_last, on_error=said.on_error
    )


def _make_steps(
    pipe: "evenflow.Pipeline",
    feed: Feed,
    job: Job,
    log: StepLog,
    checkpoints: evenflow.Checkpoints | None,
    console: Console,
) -> None:
    """Train, and validate now and then, from the step on that `log` has come to."""
    training = job.config.training
    number = log.num_steps  # of batches: those left out make no update, and a rollback makes some again
    with ProgressReport(console, num_steps=training.steps, num_made=number) as report:
        pipe.log_to(
            lambda _, numbers: report(number, numbers),
            every=lambda _: _is_shown(training, number),
            all_ranks=True,
        )
        if number == 0:
            report.line(f"before training: validation {_validate(pipe, feed):.3f} {feed.units.loss}")
        for number, batch in enumerate(log.batches(feed.batches), start=log.num_steps + 1):
            try:
                log.step(batch)
            except BadNumbersError as error:
                if checkpoints is None or training.bad_numbers != "rollback":
                    raise
                report.line(f"going back to {checkpoints.roll_back(error)}: {error}")
                continue
            if number == training.steps:  # it is saved, and validated, at the end
                continue
            if checkpoints is not None:
                checkpoints.updated(log.state)
            if number % training.validate_every == 0:
                report.line(f"step {number}: validation {_validate(pipe, feed):.3f} {feed.units.loss}")
        report.reached(number)


def _end(
    pipe: "evenflow.Pipeline", feed: Feed, job: Job, log: StepLog, folder: Path | None, console: Console
) -> None:
    """Tell what the steps took, validate, and write the run's folder, made here if it is not there."""
    last_step = pipe.last_step()  # before the last validation, which would be the last step
    console.print(bill_table(last_step.predicted_bills, last_step.measured_bills))
    schedule = job.schedule if pipe.plan is None else pipe.plan.schedule
    run, steps = log.finish(job.config.name, schedule, feed.units)
    validation_loss = _validate(pipe, feed)
    folder = folder or _folder(pipe, job)
    pipe.save(folder / CHECKPOINT)
    if pipe.is_main:
        draw_last_step(folder / PICTURE, run, last_step)
        write_run(folder, run, steps, last_step=last_step, plan=pipe.plan, config=write_config(job.config))
    print_line(console, f"wrote {folder} (look at it with: evenflow show {folder})")
    print_line(console, last_line(run, steps, validation_loss, feed.units.loss))


def _is_shown(training: Training, number: int) -> bool:
    """Whether the progress tells of a step."""
    every = (_READ_EVERY, training.validate_every)
    return number in (1, training.steps) or any(number % each == 0 for each in every)


def _folder(pipe: "evenflow.Pipeline", job: Job) -> Path:
    """The run's folder, which is there from now on; a collective call."""
    folder: Path = pipe.share((job.out if job.saves else claim(job.out)) if pipe.is_main else None)
    return folder


def _validate(pipe: "evenflow.Pipeline", feed: Feed) -> float:
    """The mean loss over the held-out batches, in the units of `feed`."""
    return feed.loss_scale * float(pipe.evaluate_all(feed.validation).loss)


def _warmup_then_cosine(
    training: Training,
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    def factor(step: int) -> float:
        if step < training.warmup_steps:
            return (step + 1) / training.warmup_steps
        done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
        return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
