"""What each stage, and each process, holds of a model that is cut."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from evenflow.checkpoint.load import persistent_buffers
from evenflow.graph.cutting.cut import Cut
from evenflow.ir.placement import Placement
from evenflow.pipe.given.cuts import node_costs
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.recorded.parameters import stages_of_parameters
from evenflow.runtime.stages.narrowing import Narrowing


@dataclass(frozen=True, slots=True)
class StageSummary:
    """How one stage came out of the cut. `share` is its part of the estimated work, 0 to 1.

    `num_sent` activations of `sends_bytes` in all leave it for each microbatch; their gradients come back.
    """

    stage: int
    rank: int
    num_nodes: int
    first: str
    last: str
    num_parameters: int
    share: float
    num_sent: int
    sends_bytes: int


def true_buffers(model: torch.nn.Module, cut: Cut, grid: Mesh, placement: Placement) -> frozenset[str]:
    """Persistent buffers that this process speaks for: what its stages change; the first, the rest."""
    if not grid.is_first_of_replicas:
        return frozenset()
    rank_of, world = placement.rank_of, grid.pipeline
    homes = {
        name: rank_of[s.stage] for s in cut.sections for node in s.nodes for name in node.changed_buffers
    }
    names = persistent_buffers(model)
    return frozenset(name for name in names if world.size == 1 or homes.get(name, 0) == world.rank)


def used_on(cut: Cut, owner: Mapping[str, int], stages: Sequence[int]) -> set[str]:
    """Parameters that one of these stages owns or uses."""
    users = stages_of_parameters(cut)
    return {name for name, home in owner.items() if not {home, *users.get(name, ())}.isdisjoint(stages)}


def summaries(
    cut: Cut,
    placement: Placement,
    narrowing: Narrowing,
    owner: Mapping[str, int],
    parameters: Mapping[str, torch.nn.Parameter],
) -> tuple[StageSummary, ...]:
    """What each stage holds. `owner`: the stage of each of the parameters."""
    costs = node_costs(cut.graph)
    edges = (0, *cut.positions, len(cut.graph.chain))
    sent = [[value for group in section.sends.values() for value in group] for section in cut.sections]
    return tuple(
        StageSummary(
            stage=stage,
            rank=placement.rank_of[stage],
            num_nodes=end - start,
            first=cut.graph.chain[start].name if end > start else "-",
            last=cut.graph.chain[end - 1].name if end > start else "-",
            num_parameters=sum(each.numel() for name, each in parameters.items() if owner[name] == stage),
            share=sum(costs[start:end]) / sum(costs),
            num_sent=len(sent[stage]),
            sends_bytes=sum(narrowing.num_bytes(cut.graph.values[value].info) for value in sent[stage]),
        )
        for stage, (start, end) in enumerate(itertools.pairwise(edges))
    )
