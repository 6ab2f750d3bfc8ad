"""`evenflow train`: all that can be checked here is, then the ranks start, and again where one is lost."""

import dataclasses
import logging
import os

import torch
from rich.console import Console

from evenflow.cli.config import Pipelining
from evenflow.cli.job import Flags, Job, make_job
from evenflow.cli.printing import print_line
from evenflow.cli.run_logs import console_of, user_output
from evenflow.cli.training import prepare_here, run_rank
from evenflow.errors import ConfigError, PeerError
from evenflow.journal.folder import claim
from evenflow.launcher import RankEnvironment, launch, rank_environment
from evenflow.pipe.given.planned import DEFAULT_SCHEDULE
from evenflow.view.units import format_count

_LOG = logging.getLogger(__name__)
_MOST_PROCESSES = max(64, 4 * (os.cpu_count() or 1))  # each takes some hundred MiB


def train(flags: Flags) -> None:
    """Check everything that can be checked in this process, then train on one process per rank.

    Raises:
        EvenflowError: Whatever stops the run; before the ranks start wherever it can be known by then.
    """
    job, place = make_job(flags), rank_environment()
    if place is not None:
        job = _under_launcher(job, flags, place)
        launch(run_rank, job, nproc=job.num_processes)
        return
    with user_output(job.config.logs):
        prepare_here(job)[0].close()
    if job.num_processes > _MOST_PROCESSES:
        raise ConfigError(
            f"{job.num_ranks} pipeline ranks, and data and tensor ranks beside, are "
            f"{job.num_processes:,} processes; here at most {_MOST_PROCESSES} are started: ask for fewer"
        )
    if job.saves and flags.resume is None:
        job = dataclasses.replace(job, out=claim(job.out))
    console, processes = console_of(job.config.logs), format_count(job.num_processes, "process", "es")
    print_line(console, f"{job.config.name}: starting {processes} × 1 thread on {job.device}")
    launch_again(job, flags.max_restarts, console)


def _under_launcher(job: Job, flags: Flags, place: RankEnvironment) -> Job:
    """The run on the ranks that torchrun has started: after a restart perhaps fewer than it asks for."""
    if flags.max_restarts:
        raise ConfigError("--max-restarts under torchrun: it is torchrun that restarts, give it the flag")
    if job.saves and flags.resume is None:
        raise ConfigError(
            "under torchrun a run that saves needs --resume FOLDER, a new one or that of the run to go on "
            "with: each of torchrun's restarts must find the same"
        )
    return fitting(job, place.num_ranks) if place.num_restarts else job


def launch_again(job: Job, max_restarts: int, console: Console) -> None:
    """Start the run's ranks, and start them again where one was lost, at most so many times.

    What a rank refuses (a wrong configuration, say) would be refused again, and is raised at once.
    """
    for restart in range(max_restarts + 1):
        try:
            launch(run_rank, job, nproc=job.num_processes)
        except PeerError as error:
            if restart == max_restarts:
                raise
            print_line(console, f"restart {restart + 1} of {max_restarts}: {error}")
            left = torch.cuda.device_count() if job.device == "cuda" else job.num_processes
            job = fitting(job, left)
        else:
            return


def fitting(job: Job, num_processes: int) -> Job:
    """The run as it is, or, where it needs more processes than there are, planned again for those.

    Then nothing that was said of stages, schedule and meshes holds: the ranks measure the model and plan.
    """
    if job.num_processes <= num_processes:
        return job
    said = job.config.pipeline
    _LOG.warning(
        "%d processes are left of %d: planning again for those, whatever was said of the pipeline",
        num_processes,
        job.num_processes,
    )
    open_again = Pipelining(exact=said.exact, link=said.link, compile=said.compile, timeout=said.timeout)
    return dataclasses.replace(
        job,
        config=dataclasses.replace(job.config, pipeline=open_again),
        plan=None,
        schedule=DEFAULT_SCHEDULE,
        stages_per_rank=1,
        num_stages=num_processes,
        num_ranks=num_processes,
    )
