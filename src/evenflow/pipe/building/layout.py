"""Where the stages live, and in which order they work: from `pipeline`'s levers, or a plan in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenflow.ir.placement import Placement
from evenflow.pipe.building import auto
from evenflow.pipe.building.asked import Asked
from evenflow.pipe.building.measured import Run
from evenflow.pipe.given.cuts import stage_count, stages_on_each
from evenflow.pipe.given.places import device_kind, devices_of, own_device, world_of
from evenflow.pipe.given.planned import Decided, decided, given_plan
from evenflow.pipe.given.programs import Programs
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.plan import Plan
from evenflow.runtime.ranks.mesh import Mesh, mesh_of
from evenflow.runtime.ranks.watchdog import watched
from evenflow.runtime.ranks.world import World
from evenflow.schedules import catalog


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of a pipeline before its model is recorded.

    `devices` are those of all stages, `own` the stages of this process. Who keeps a layout keeps no batch.
    """

    decided: Decided
    mesh: Mesh
    shard: str | None
    splitter: Splitter
    programs: Programs
    devices: tuple[torch.device, ...]
    own: Sequence[int]

    @property
    def world(self) -> World:
        """The ranks of this process's pipeline."""
        return self.mesh.pipeline

    @property
    def placement(self) -> Placement:
        """On which rank each stage is."""
        return self.programs.placement

    def process_of(self, stage: int) -> int:
        """The rank of the pipeline's processes that has a stage."""
        return self.placement.rank_of[stage] if self.world.size > 1 else 0

    @property
    def device(self) -> torch.device:
        """This process's device (the first stage's, where it holds those of all ranks)."""
        return self.devices[self.own[0]]


def laid_out(
    asked: Asked,
    levers: dict[str, Any],
    *,
    plan: Plan | str | Path | None,
    mesh: Mapping[str, int] | None,
    shard: str | None,
    device: str | torch.device | None,
    timeout: float | None,
) -> tuple[Layout, Sequence[Any]]:
    """Find the processes, read or make a plan, ask the schedule for the first batch; collective.

    Returns the example's microbatches too.

    `levers` are `pipeline`'s arguments that a plan decides, as are the others here. Raises `ConfigError`
    where they contradict each other, the processes or the example.
    """
    kind, (chosen, degrees, shard) = device_kind(device), given_plan(plan, mesh, shard)
    grid = mesh_of(watched(world_of(kind, timeout), timeout), degrees)
    run = Run(
        asked.model,
        asked.loss,
        asked.example,
        asked.optimizer,
        atomic=asked.atomic,
        seed=asked.seed,
        link=asked.link,
        compiles=asked.compiling is not None,
        narrowing=asked.narrowing,
    )
    made, levers = auto.planned(
        chosen, levers, grid, own_device(kind, grid.world), run=run, exact=asked.exact
    )
    given = decided(made, **levers)
    method = catalog.get(given.schedule) if isinstance(given.schedule, str) else given.schedule
    on_each = stages_on_each(given.stages_per_rank, given.schedule)
    num_stages = stage_count(given.stages, given.split, grid, kind, stages_per_rank=on_each)
    num_ranks = num_stages // on_each
    splitter = Splitter(
        num_ranks,
        given.num_microbatches,
        given.microbatch_size,
        given.split_batch,
        num_replicas=grid.data.size,
        dtype=asked.precision.batch,
    )
    items = splitter(asked.example).items
    programs = Programs(
        grid.pipeline,
        method,
        num_ranks=num_ranks,
        stages_per_rank=on_each,
        num_microbatches=grid.longest_share(len(items)),
        unshard=shard == "fsdp",
        costs=given.costs,
    )
    placement = programs.placement
    devices = devices_of(kind, placement, grid, given.places(placement))
    own = grid.stages_of(grid.world.rank, placement)
    return Layout(given, grid, shard, splitter, programs, devices, own), items
