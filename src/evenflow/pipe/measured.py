"""A question to the planner about this very run: its processes measure the model, their devices and links.

All ranks of a run measure at the same time, because they share what a host has (its memory, its caches), and
so meet the conditions of the run itself.
"""

import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.cost.cache import Cache, Place, device_name
from evenflow.cost.local_device import local_device
from evenflow.cost.optimizer import OptimizerCost, OptimizerFactory, optimizer_cost
from evenflow.cost.profile import Profile
from evenflow.errors import EvenflowError
from evenflow.ir.costs import Link
from evenflow.pipe.choices import Splitter
from evenflow.pipe.probe import Probed, probe
from evenflow.pipe.recorded import planned_leaf_share, recorded, row_tokens
from evenflow.plan.chain import Chain, Seconds
from evenflow.plan.overheads import Overheads
from evenflow.plan.request import Levers, Request
from evenflow.runtime.links.process_group import RECEIVES_AHEAD, SENDS_AHEAD
from evenflow.runtime.recordings import Program
from evenflow.runtime.weights import rows_of
from evenflow.runtime.world import World

_SIZES = (1, 2, 4, 8, 16, 32)  # rows of a microbatch that are tried
# Agreeing on the batch and the result: 4 to 10 ms on two CPU cores over Gloo (measured 2026-11-22).
_STEP_SECONDS = 6e-3
_SECONDS = ("forward_seconds", "backward_seconds", "input_grad_seconds", "entry_seconds")
_BUDGET_SECONDS = 0.15  # to measure each distinct node

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be planned: `pipeline`'s arguments of the same names."""

    model: torch.nn.Module
    loss: Program
    example: Any
    optimizer: OptimizerFactory | None
    atomic: Sequence[type[torch.nn.Module]] = ()
    seed: int = 0
    levers: Levers = field(default_factory=Levers)


def measured_request(
    run: Run,
    world: World,
    device: torch.device,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Request:
    """Measure, and return the question; collective, and the same on every rank.

    Raises `ConfigError` and `RecordError` for a run that cannot work.
    """
    tell = progress or (lambda _: None)
    share = planned_leaf_share(max(world.size, 2))
    rows = rows_of(run.example) or 1
    given = run.levers.microbatch_size
    most = max(1, rows // world.size)  # more leave a rank without work
    sizes = (given,) if given is not None else tuple(n for n in _SIZES if n <= most and rows % n == 0)
    chains = {size: _chain(run, world, device, size, share, cache, tell) for size in sizes}
    tell("measuring links and the optimizer")
    links = probe(world, device) if world.size > 1 else {}
    mine = optimizer_cost(run.optimizer, dict(run.model.named_parameters()), device)
    costs: list[tuple[str, OptimizerCost]] = world.gather((device_name(device), mine))
    op_seconds = statistics.median(
        op for found in world.gather([op for _, op in chains.values()]) for op in found
    )
    return Request(
        lambda size: chains[size][0],
        sizes,
        _cluster(world, device, links),
        batch_rows=rows,
        row_tokens=row_tokens(run.example),
        max_leaf_share=share,
        state=costs[0][1].state,
        dtype=str(next(run.model.parameters()).dtype).removeprefix("torch."),
        levers=run.levers,
        overheads=_overheads(list(links.values()), op_seconds),
        update_seconds_per_byte={kind: cost.seconds_per_byte for kind, cost in costs},
    )


def _chain(
    run: Run, world: World, device: torch.device, size: int, share: float, cache: Path | None, tell: Progress
) -> tuple[Chain, float]:
    """The measured chain for microbatches of `size` rows, and what an op takes beside its nodes."""

    def named(name: str, done: int, total: int) -> None:
        tell(f"measuring {name} ({done + 1} of {total}) in microbatches of {size}")

    def measured() -> Profile:
        found = recorded(
            run.model,
            loss=run.loss,
            example=run.example,
            splitter=Splitter(world.size, None, size, None),
            max_leaf_share=share,
            device=device,
            atomic=run.atomic,
            seed=run.seed,
        )
        return found.profile(cache=cache, budget_seconds=_BUDGET_SECONDS, progress=named)

    mine: Profile | EvenflowError
    try:
        mine = measured()
    except EvenflowError as error:
        mine = error
    profiles = world.gather(mine)
    for each in profiles:
        if isinstance(each, EvenflowError):
            raise each
    _keep_means(profiles, Cache(cache, Place.of(device)))
    return _together(profiles), profiles[world.rank].op_seconds


def _keep_means(profiles: Sequence[Profile], cache: Cache) -> None:
    """Keep the means of what the ranks measured: the next time all find the same."""
    alike = [each for each in profiles if each.chain.seconds.keys() == {cache.device}]
    for sign, (name, first) in alike[0].measured.items() if any(each.num_measured for each in alike) else ():
        every = [each.measured[sign][1] for each in alike]
        means: dict[str, Any] = {
            field: statistics.fmean(getattr(each, field) for each in every) for field in _SECONDS
        }
        cache.keep(sign, name, replace(first, **means))


def _together(profiles: Sequence[Profile]) -> Chain:
    """One chain, with the mean of what the ranks of each kind of device measured."""
    by_kind: dict[str, list[Seconds]] = {}
    for profile in profiles:
        for kind, seconds in profile.chain.seconds.items():
            by_kind.setdefault(kind, []).append(seconds)
    return replace(profiles[0].chain, seconds={kind: _mean(found) for kind, found in by_kind.items()})


def _mean(found: Sequence[Seconds]) -> Seconds:
    def over(name: str) -> tuple[float, ...]:
        return tuple(map(statistics.fmean, zip(*(getattr(each, name) for each in found), strict=True)))

    return Seconds(over("forward"), over("input_grad"), over("weight_grad"))


def _overheads(links: Sequence[Probed], op_seconds: float) -> Overheads:
    def median(numbers: list[float]) -> float:
        return statistics.median(numbers) if numbers else 0.0

    return Overheads(
        op_seconds,
        median([each.parcel_seconds for each in links]),
        median([each.seconds_per_byte for each in links]),
        _STEP_SECONDS,
        receives_ahead=RECEIVES_AHEAD,
        sends_ahead=SENDS_AHEAD,
    )


def _cluster(world: World, device: torch.device, links: Mapping[tuple[int, int], Probed]) -> Cluster:
    """The ranks' devices, and the links between neighbours; others are as those of the same sort."""
    names: list[str] = world.gather(socket.gethostname())
    mine = local_device(device, device_name(device), num_sharing=names.count(names[world.rank]))
    devices: list[Device] = world.gather(mine)
    kinds = {each.name: each for each in reversed(devices)}
    ranks = range(world.size)
    known = {pair: each.link for (a, b), each in links.items() for pair in ((a, b), (b, a))}
    inside = [link for (a, b), link in known.items() if names[a] == names[b]]
    outside = [link for (a, b), link in known.items() if names[a] != names[b]]
    hosts = []
    for _, group in groupby(ranks, key=lambda rank: names[rank]):
        own = tuple(replace(kinds[devices[r].name], memory_bytes=devices[r].memory_bytes) for r in group)
        hosts.append(Host(own, _slowest(inside)))
    return Cluster(tuple(hosts), _slowest(outside), known)


def _slowest(links: Sequence[Link]) -> Link:
    return min(links, key=lambda link: link.bytes_per_second, default=Link())
