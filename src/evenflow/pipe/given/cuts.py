"""How many stages there are, and where a model is cut into them: as asked for, or where work balances."""

import math
from collections.abc import Sequence

import torch

from evenflow.errors import ConfigError
from evenflow.graph.cutting.positions import crossing_bytes, legal_positions
from evenflow.graph.nouns.graph import Graph
from evenflow.pipe.given.refuse import unknown_module
from evenflow.plan.cuts.partition import balanced_cuts
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.schedules import catalog
from evenflow.schedules.catalog import ScheduleFunction

# FLOPs that one element of a node's result is reckoned to cost beside its matrix products: memory traffic.
_FLOPS_PER_ELEMENT = 16
NO_CUT = "a cut there would part a tensor from one that shares its memory and is changed later"
_MOST_STAGES = 2_000  # a schedule of them is made before the model is cut, in seconds


def stages_on_each(stages_per_rank: int | None, schedule: str | ScheduleFunction) -> int:
    """How many stages each rank holds: what was asked for, or what suits the schedule."""
    if stages_per_rank is not None and stages_per_rank < 1:
        raise ConfigError(f"stages_per_rank={stages_per_rank} must be at least 1")
    return stages_per_rank or (catalog.default_stages_per_rank(schedule) if isinstance(schedule, str) else 1)


def stage_count(
    stages: int | None, split: Sequence[str] | None, mesh: Mesh, kind: str, *, stages_per_rank: int
) -> int:
    """How many stages; `ConfigError` where arguments contradict each other or the number of processes."""
    if stages is not None and stages < 1:
        raise ConfigError(f"stages={stages} must be at least 1")
    if split is not None:
        if stages is not None and stages != len(split) + 1:
            raise ConfigError(
                f"split= names {len(split)} cuts, which makes {len(split) + 1} stages, but stages={stages}"
            )
        stages = len(split) + 1
    if max(stages or 1, stages_per_rank) > _MOST_STAGES:
        raise ConfigError(
            f"stages={stages} of stages_per_rank={stages_per_rank}: there can be {_MOST_STAGES:,} at most"
        )
    if stages is not None and stages % stages_per_rank:
        below = stages - stages % stages_per_rank
        near = [str(number) for number in (below, below + stages_per_rank) if number]
        raise ConfigError(
            f"{stages} stages cannot be dealt out {stages_per_rank} to each rank; the nearest that can: "
            f"{' and '.join(near)} (or give stages_per_rank=)"
        )
    if mesh.pipeline.size > 1:
        fitting = mesh.pipeline.size * stages_per_rank
        if stages is not None and stages != fitting:
            raise ConfigError(_misfit(stages, stages_per_rank, mesh))
        return fitting
    num_ranks = max(1, torch.cuda.device_count()) if kind == "cuda" and mesh.world.size == 1 else 1
    return stages or num_ranks * stages_per_rank


def _misfit(stages: int, stages_per_rank: int, mesh: Mesh) -> str:
    """Why so many stages don't fit the processes, and what would."""
    num_ranks, size, fitting = (
        stages // stages_per_rank,
        mesh.world.size,
        mesh.pipeline.size * stages_per_rank,
    )
    each = f", {stages_per_rank} on each rank," if stages_per_rank > 1 else ""
    if mesh.is_whole:
        data = (
            f', or let them be data ranks: mesh={{"dp": {size // num_ranks}}}'
            if size % num_ranks == 0
            else ""
        )
        return (
            f"{stages} stages{each} need {num_ranks} processes, but {size} are running; start with "
            f"torchrun --nproc-per-node {num_ranks}, or ask for stages={fitting}{data}"
        )
    return (
        f"{stages} stages{each} need {num_ranks} pipeline ranks, and the mesh has {mesh.pipeline.size}: ask "
        f'for stages={fitting}, or for mesh= with "pp": {num_ranks}'
    )


def leaf_share(num_stages: int, *, compiles: bool = False) -> float:
    """The largest share of all FLOPs that a leaf may hold by default: a quarter of a stage's.

    Where blocks are compiled it is a stage's, for what is taken apart is not compiled, and half of a single
    one's: the whole model is no block.
    """
    return 1 / max(2, num_stages) if compiles else 1 / (4 * num_stages)


def check_share(max_leaf_share: float | None) -> None:
    """Refuse a share that is none."""
    if max_leaf_share is not None and not 0 <= max_leaf_share <= 1:
        raise ConfigError(f"max_leaf_share={max_leaf_share} must lie between 0 and 1")


def check_split(model: torch.nn.Module, split: Sequence[str]) -> None:
    """Refuse names that the model does not have, with the nearest that it has."""
    if isinstance(split, str):
        raise ConfigError(f"split={split!r} is one string; give a list of module names: split=[{split!r}]")
    names = [name for name, _ in model.named_modules() if name]
    for name in split:
        if name not in names:
            raise unknown_module("split", name, names)


def positions_of(graph: Graph, split: Sequence[str] | None, num_stages: int) -> tuple[int, ...]:
    """Where to cut: before the modules named, or where estimated FLOPs balance.

    Raises `ConfigError` where no cut may stand, or there are too few places.
    """
    return _balanced(graph, num_stages) if split is None else _before(graph, split)


def _balanced(graph: Graph, num_stages: int) -> tuple[int, ...]:
    costs = node_costs(graph)
    try:
        return balanced_cuts(
            costs,
            cut_bytes=crossing_bytes(graph)[:-1],
            legal=legal_positions(graph)[:-1],
            num_stages=num_stages,
            # Of fp32 twice an element: it is handed over, and its gradient.
            cost_per_byte=_FLOPS_PER_ELEMENT / 2,
        )
    except ConfigError as error:
        heaviest = max(zip(costs, graph.chain, strict=True), key=lambda pair: pair[0])[1]
        if heaviest.whole is not None:
            error.add_note(f"{heaviest.name} was not taken apart: {heaviest.whole}")
        raise


def _before(graph: Graph, split: Sequence[str]) -> tuple[int, ...]:
    legal, positions = legal_positions(graph), list[int]()
    names = [node.name for node in graph.chain]
    for name in split:
        inside = (f"{name}:", f"{name}.")
        at = next((at for at, each in enumerate(names) if each == name or each.startswith(inside)), None)
        if at is None:
            raise ConfigError(
                f"split= names {name!r}, but the recorded program runs nothing of it on a stage"
            )
        if at == 0 or (positions and at <= positions[-1]):
            before = "the first stage" if at == 0 else f"the cut before {split[len(positions) - 1]!r}"
            raise ConfigError(
                f"split= names {name!r}, which leaves nothing for {before}; name modules in the order in "
                "which they run"
            )
        if not legal[at]:
            raise ConfigError(f"split= names {name!r}, but {NO_CUT}")
        positions.append(at)
    return tuple(positions)


def node_costs(graph: Graph) -> list[float]:
    """Estimated cost of each node of the chain: FLOPs and memory traffic of its forward."""
    return [
        node.flops + _FLOPS_PER_ELEMENT * sum(math.prod(graph.values[v].info.shape) for v in node.makes)
        for node in graph.chain
    ]
