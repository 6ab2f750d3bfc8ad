"""What a pipeline is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenflow.pipe.building.holdings import StageSummary
from evenflow.pipe.given.precision import Precision
from evenflow.pipe.given.programs import Programs
from evenflow.pipe.given.splitter import Prepared
from evenflow.pipe.parameters.fixed import FixedParameters
from evenflow.pipe.parameters.replicas import SharedBuffers
from evenflow.pipe.parameters.update import Updater
from evenflow.plan.plan import Plan
from evenflow.runtime.links.link import Link
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.joining import Joining
from evenflow.runtime.recorded.recordings import Recordings
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.recorded.weights import Weigher
from evenflow.runtime.stages.narrowing import Narrowing
from evenflow.runtime.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pipeline is made of; `build` puts it together."""

    model: torch.nn.Module
    loss: Program
    mesh: Mesh
    world: World  # the ranks of this process's pipeline: those of the mesh
    link: Link
    stages: Mapping[int, Stage]  # those of this process
    devices: Sequence[torch.device]  # of all stages
    recordings: Recordings
    updater: Updater
    fixed: FixedParameters
    programs: Programs
    splitter: Callable[[Any], Prepared]
    weigher: Weigher
    joining: Joining  # of metrics
    reduction: str  # how the step's loss is put together, for people
    shared_buffers: SharedBuffers
    buffers: frozenset[str]  # persistent ones, of which this process has the true numbers
    summaries: tuple[StageSummary, ...]
    precision: Precision
    narrowing: Narrowing  # in which type tensors travel between stages
    loaded: Path | None  # the folder that the weights came from
    plan: Plan | None

    @property
    def device(self) -> torch.device:
        """This process's device (the first stage's, where it holds those of all ranks)."""
        return next(iter(self.stages.values())).device

    @property
    def source(self) -> int:
        """Which rank of the pipeline has what the last stage computes."""
        return self.programs.placement.rank_of[-1] if self.world.size > 1 else 0
