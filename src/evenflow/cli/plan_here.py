"""`evenflow plan` without a cluster: this machine's ranks measure the model and their links, and plan."""

from rich.console import Console

from evenflow.cli.feed import make_feed
from evenflow.cli.job import Job
from evenflow.cli.source import build, refusing
from evenflow.cli.training import make_optimizer
from evenflow.cost.cache import user_folder
from evenflow.launcher import launch
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.given.places import own_device, world_of
from evenflow.plan.plan import Plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers


def plan_here(job: Job, levers: Levers, memory_bytes: float | None) -> Plan:
    """Plan the job on as many processes of this machine as it has ranks; measurements are kept.

    Raises:
        EvenflowError: The model or the levers cannot work as given, or nothing fits.
    """
    return launch(_on_rank, job, levers, memory_bytes, nproc=job.num_ranks)[0]


def _on_rank(job: Job, levers: Levers, memory_bytes: float | None) -> Plan:
    world, training = world_of(job.device), job.config.training
    console = Console(quiet=world.rank != 0)
    with console.status("recording the model") as status, refusing("the model cannot be measured"):
        source = build(job.config.model, seed=training.seed)
        run = Run(
            source.model,
            source.loss,
            make_feed(job.config.data, source, training).validation[0],
            make_optimizer(training),
            seed=training.seed,
            levers=levers,
        )
        request = measured_request(
            run, world, own_device(job.device, world), cache=user_folder(), progress=status.update
        )
        return plan(request.with_memory(memory_bytes))
