"""Restarting a run whose ranks were lost: from its last whole checkpoint, on the devices that are left."""

import dataclasses
import logging

import torch
from rich.console import Console
from rich.text import Text

from evenflow.cli.config import Pipelining
from evenflow.cli.training import Job, run_rank
from evenflow.errors import PeerError
from evenflow.launcher import launch

_LOG = logging.getLogger(__name__)


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
            console.print(Text(f"restart {restart + 1} of {max_restarts}: {error}"), soft_wrap=True)
            job = fitting(job, num_processes_left(job))
        else:
            return


def num_processes_left(job: Job) -> int:
    """For how many processes there are devices: on the CPU always for all."""
    return torch.cuda.device_count() if job.device == "cuda" else job.num_processes


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
        schedule="1f1b",
        stages_per_rank=1,
        num_stages=num_processes,
        num_ranks=num_processes,
    )
