"""The choices that `pipeline` makes or checks: devices, processes, number of stages, where to cut."""

import atexit
import difflib
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.graph import Graph
from evenflow.graph.positions import crossing_bytes, legal_positions
from evenflow.graph.template import flatten_tree
from evenflow.ir.placement import Placement
from evenflow.pipe.agree import Prepared
from evenflow.plan.partition import balanced_cuts
from evenflow.runtime import microbatch as microbatches
from evenflow.runtime import network
from evenflow.runtime.host_memory import keep_freed_memory
from evenflow.runtime.mesh import Mesh
from evenflow.runtime.microbatch import Microbatches
from evenflow.runtime.watchdog import TIMEOUT_SECONDS, check_timeout, group_seconds
from evenflow.runtime.world import ProcessGroupWorld, SingleProcess, World
from evenflow.schedules import catalog
from evenflow.schedules.catalog import ScheduleFunction

# FLOPs that one element of a node's result is reckoned to cost beside its matrix products: memory traffic.
FLOPS_PER_ELEMENT = 16
LEAVE_SECONDS = 10.0
_MOST_STAGES = 2_000  # a schedule of them is made before the model is cut, in seconds
TIMEOUT = timedelta(minutes=5)  # a lost peer ends every survivor within it, where no watchdog does


@dataclass(frozen=True, slots=True)
class Splitter:
    """Turns a batch into microbatches, always in the same way."""

    num_ranks: int
    num_microbatches: int | None
    microbatch_size: int | None
    split_batch: Callable[[Any], Sequence[Any]] | None
    num_replicas: int = 1  # of the pipeline, among which the microbatches are shared out
    dtype: torch.dtype | None = None  # that of floating-point tensors, where it is to be another

    def __call__(self, given: Any) -> Prepared:
        batch = given if self.dtype is None else pytree.tree_map(self._cast, given)
        if isinstance(batch, Microbatches) or self.split_batch is not None:
            items = list(batch.items if isinstance(batch, Microbatches) else self.split_batch(batch))  # type: ignore[misc]  # one of the two holds
            if not items:
                raise ConfigError("the batch was split into no microbatch at all")
            flatten_tree(items)  # as below
            return Prepared([microbatches.with_count_as_tensor(item) for item in items], range(len(items)))
        flatten_tree(batch)  # teaches torch the dataclasses and mappings in it
        size = microbatches.batch_size(batch)
        if size == 0:
            raise ConfigError("the batch has no rows")
        num = microbatches.count(
            size,
            num_microbatches=self.num_microbatches,
            microbatch_size=self.microbatch_size,
            num_ranks=self.num_ranks,
            num_replicas=self.num_replicas,
        )
        batch = microbatches.with_count_as_tensor(batch)
        rows = microbatches.bounds(size, num, microbatch_size=self.microbatch_size)
        items = microbatches.split(batch, num, microbatch_size=self.microbatch_size)
        return Prepared(items, [end - start for start, end in itertools.pairwise(rows)], batch)

    def _cast(self, leaf: Any) -> Any:  # any leaf of a batch
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def device_kind(device: str | torch.device | None) -> str:
    """Return "cpu" or "cuda"; raises `ConfigError` where CUDA was asked for and there is none."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device that torch knows; use 'cpu' or 'cuda'") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={str(device)!r} was asked for, but torch {torch.__version__} finds no CUDA device; "
            "use device='cpu', or install a CUDA build of torch"
        )
    return kind


def world_of(kind: str, timeout: float | None = TIMEOUT_SECONDS) -> World:
    """The processes of this run: torch.distributed's if it is set up or the elastic launcher started us.

    A group that is made here gives up later than a watchdog with this `timeout`, in seconds.
    """
    check_timeout(timeout)
    if kind == "cpu":
        keep_freed_memory()
    if not dist.is_available():
        return SingleProcess()
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        waits = TIMEOUT if timeout is None else timedelta(seconds=group_seconds(timeout, kind))
        network.join("gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl", waits)
        atexit.register(_leave)  # a group that nobody closes can abort the interpreter as it ends
    if dist.is_initialized() and kind == "cuda":
        torch.cuda.set_device(_cuda_index(dist.get_rank()))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SingleProcess()
    return ProcessGroupWorld(_device_of(kind, dist.get_rank()))


def own_device(kind: str, world: World) -> torch.device:
    """The device that this process has if nothing else is said."""
    return _device_of(kind, world.rank)


def _device_of(kind: str, number: int) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", _cuda_index(number))


def _leave() -> None:
    if dist.is_initialized():
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(LEAVE_SECONDS)  # with a peer gone it may wait for ever


def _cuda_index(number: int) -> int:
    return number % torch.cuda.device_count()


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


def devices_of(
    kind: str, placement: Placement, mesh: Mesh, places: Sequence[int] | None = None
) -> tuple[torch.device, ...]:
    """The device of each stage: its rank's, `places[rank]` if given; they take turns over those there are."""
    if kind == "cpu":
        return (torch.device("cpu"),) * placement.num_stages
    order: Sequence[int] = range(placement.num_ranks)
    if mesh.world.size > 1:
        order = mesh.pipeline.members if mesh.pipeline.size > 1 else [mesh.world.rank] * placement.num_ranks
    if places is not None and mesh.is_whole:
        order = places
    return tuple(torch.device("cuda", _cuda_index(order[rank])) for rank in placement.rank_of)


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
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigError(
                f"split= names {name!r}, which is no module of the model; nearest are "
                f"{', '.join(map(repr, near))}"
            )


def positions_of(graph: Graph, split: Sequence[str] | None, num_stages: int) -> tuple[int, ...]:
    """Where to cut: before the modules named, or where estimated FLOPs balance."""
    legal = legal_positions(graph)
    if split is None:
        costs = node_costs(graph)
        try:
            return balanced_cuts(
                costs,
                cut_bytes=crossing_bytes(graph)[:-1],
                legal=legal[:-1],
                num_stages=num_stages,
                cost_per_byte=FLOPS_PER_ELEMENT
                / 2,  # of fp32 twice an element: it is handed over, and its gradient
            )
        except ConfigError as error:
            heaviest = max(zip(costs, graph.chain, strict=True), key=lambda pair: pair[0])[1]
            if heaviest.whole is not None:
                error.add_note(f"{heaviest.name} was not taken apart: {heaviest.whole}")
            raise
    positions: list[int] = []
    for name in split:
        inside = (name, f"{name}:", f"{name}.")
        at = next(
            (
                i
                for i, node in enumerate(graph.chain)
                if node.name == name or node.name.startswith(inside[1:])
            ),
            None,
        )
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
            raise ConfigError(
                f"split= names {name!r}, but a cut there would part a tensor from one that shares its memory "
                "and is changed later"
            )
        positions.append(at)
    return tuple(positions)


def node_costs(graph: Graph) -> list[float]:
    """Estimated cost of each node of the chain: FLOPs and memory traffic of its forward."""
    return [
        node.flops + FLOPS_PER_ELEMENT * sum(math.prod(graph.values[v].info.shape) for v in node.makes)
        for node in graph.chain
    ]
