"""A question to the planner about this very run: its processes measure the model, their devices and links.

All ranks of a run measure at the same time, because they share what a host has (its memory, its caches), and
so meet the conditions of the run itself.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.device import Device
from evenflow.cost.cache import Cache, Place, device_name
from evenflow.cost.local_device import local_device
from evenflow.cost.optimizer import OptimizerCost, OptimizerFactory, optimizer_cost
from evenflow.cost.outline import as_it_travels
from evenflow.cost.profile import Profile, profile_of
from evenflow.cost.recorded import Recorded
from evenflow.cost.rehearsal import Passed, Rehearsal, as_rehearsed, found_in, keep_in, over
from evenflow.errors import EvenflowError
from evenflow.ir.costs import Link as LinkCost
from evenflow.ir.placement import Placement
from evenflow.pipe.building.probe import Probed, probe
from evenflow.pipe.building.recorded import planned_leaf_share, recorded, row_tokens
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.chain import Chain, Seconds
from evenflow.plan.costs.overheads import Overheads
from evenflow.plan.request import Levers, Request
from evenflow.runtime.links.choose import link_for
from evenflow.runtime.links.link import Link
from evenflow.runtime.notes.processes import this_host
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.tracing import Program
from evenflow.runtime.recorded.weights import rows_of
from evenflow.runtime.stages.narrowing import Narrowing

_NUM_SIZES = 6  # of a microbatch, that are tried
# Agreeing on the batch and the result: 1 to 3 ms on two CPU cores of one host (measured 2026-11-23). Between
# hosts it is measured.
_STEP_SECONDS = 2e-3
_STEPS = 9
_SECONDS = ("forward_seconds", "backward_seconds", "input_grad_seconds", "entry_seconds")
_BUDGET_SECONDS = 0.05  # to measure each distinct node
_ROUNDS, _PASSES = 4, 2  # of rehearsals
_SLOW = 1.25  # times the quickest pass: the machine did something else
_ROOM = 0.5  # the share of a device's memory that rehearsals may fill

T = TypeVar("T")

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
    link: str = "auto"
    compiles: bool = False
    narrowing: Narrowing = field(default_factory=Narrowing)
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
    share = planned_leaf_share(max(world.size, 2), compiles=run.compiles)
    rows = rows_of(run.example) or 1
    given = run.levers.microbatch_size
    sizes = (given,) if given is not None else _sizes(rows, world.size)
    hosts: list[str] = world.gather(this_host())
    mine = local_device(device, device_name(device), num_sharing=hosts.count(hosts[world.rank]))
    measured = {size: _profiled(run, world, device, size, share, cache, tell) for size in sizes}
    room_bytes = mine.memory_bytes * _ROOM
    chains = _rehearsed(measured, world, room_bytes, Cache(cache, Place.of(device)), tell)
    chains = {
        size: as_it_travels(chain, measured[size][0].graph, run.narrowing.num_bytes)
        for size, chain in chains.items()
    }
    tell("measuring links and the optimizer")
    link = link_for(world, device, Placement.linear(world.size), run.link)
    links = probe(world, device, link) if world.size > 1 else {}
    optimizer = optimizer_cost(run.optimizer, dict(run.model.named_parameters()), device)
    costs: list[tuple[str, OptimizerCost]] = world.gather((device_name(device), optimizer))
    op_seconds = statistics.median(
        profile.op_seconds for _, profiles in measured.values() for profile in profiles
    )
    return Request(
        chains.__getitem__,
        sizes,
        _cluster(world, hosts, mine, links),
        batch_rows=rows,
        row_tokens=row_tokens(run.example),
        max_leaf_share=share,
        state=costs[0][1].state,
        dtype=str(next(run.model.parameters()).dtype).removeprefix("torch."),
        levers=run.levers,
        overheads=_overheads(
            link, list(links.values()), op_seconds, step_seconds=_agreeing_seconds(world, hosts)
        ),
        update_seconds_per_byte={kind: cost.seconds_per_byte for kind, cost in costs},
    )


def _sizes(rows: int, num_ranks: int) -> tuple[int, ...]:
    """Rows of a microbatch that are tried: the largest that leaves work for every rank, about half of it, ...

    >>> _sizes(16, 2), _sizes(1000, 4), _sizes(7, 2)
    ((1, 2, 4, 8), (5, 10, 25, 50, 125, 250), (1,))
    """
    most = max(1, rows // num_ranks)
    even = [size for size in range(1, most + 1) if rows % size == 0]
    halves = (most >> times for times in range(_NUM_SIZES))
    return tuple(sorted({max(size for size in even if size <= half) for half in halves if half}))


def _profiled(
    run: Run, world: World, device: torch.device, size: int, share: float, cache: Path | None, tell: Progress
) -> tuple[Recorded, list[Profile]]:
    """Microbatches of `size` rows: this rank's recording, and what every rank measured of its nodes."""
    recordings: list[Recorded] = []

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
        recordings.append(found)
        return profile_of(found, cache=cache, budget_seconds=_BUDGET_SECONDS, progress=named)

    profiles = _on_every_rank(world, measured)
    _keep_means(profiles, Cache(cache, Place.of(device)))
    return recordings[0], profiles


def _rehearsed(
    measured: Mapping[int, tuple[Recorded, Sequence[Profile]]],
    world: World,
    room_bytes: float,
    cache: Cache,
    tell: Progress,
) -> dict[int, Chain]:
    """The chain of each size, with what the ranks of each kind of device measured and rehearsed, in the mean.

    All sizes have a turn in each round, so that what slows the machine for a while slows all of them alike. A
    device that has no room for the whole program does not rehearse.
    """
    own = {size: (found, profiles[world.rank]) for size, (found, profiles) in measured.items()}
    rehearsals = {size: Rehearsal.of(found, mine.chain) for size, (found, mine) in own.items()}
    passed = {size: found_in(cache, own[size][1].signs, each.positions) for size, each in rehearsals.items()}
    new: dict[int, list[Passed]] = {size: [] for size, known in passed.items() if known is None}

    def passes(size: int) -> list[Passed]:
        if size not in new or rehearsals[size].needed_bytes > room_bytes:
            return []
        try:
            return rehearsals[size].run(_PASSES, late=world.rank % 2 == 1)
        except torch.OutOfMemoryError:
            return []

    for number in range(_ROUNDS):
        for size in measured:
            if size in new:
                tell(f"rehearsing microbatches of {size} (round {number + 1} of {_ROUNDS})")
            new.get(size, []).extend(_on_every_rank(world, partial(passes, size))[world.rank])
    chains = {}
    for size, (_, profiles) in measured.items():
        mine = over(_quiet, new[size]) if new.get(size) else passed[size]
        positions, signs = rehearsals[size].positions, profiles[world.rank].signs
        by_kind = _means(world.gather((cache.device, mine)))
        if new.get(size):
            keep_in(cache, signs, positions, by_kind[cache.device])
        op_seconds = statistics.median(profile.op_seconds for profile in profiles)
        chains[size] = as_rehearsed(
            _together(profiles), profiles[0].alike, positions, by_kind, op_seconds=op_seconds
        )
    return chains


def _on_every_rank(world: World, act: Callable[[], T]) -> list[T]:
    """What every rank's `act` returns; raises on all ranks what it raises on one."""
    mine: T | EvenflowError
    try:
        mine = act()
    except EvenflowError as error:
        mine = error
    found: list[T] = []
    for each in world.gather(mine):
        if isinstance(each, EvenflowError):
            raise each
        found.append(each)
    return found


def _quiet(seconds: Iterable[float]) -> float:
    """What it mostly takes while the machine does nothing else: the median without what was far slower.

    >>> _quiet([1.0, 1.1, 1.2, 1.6, 1.7])
    1.1
    """
    known = list(seconds)
    return statistics.median(each for each in known if each <= _SLOW * min(known))


def _means(passed: Sequence[tuple[str, Passed | None]]) -> dict[str, Passed]:
    """For each kind of device what its ranks took in the mean, where any has rehearsed."""
    by_kind: dict[str, list[Passed]] = {}
    for kind, each in passed:
        if each is not None:
            by_kind.setdefault(kind, []).append(each)
    return {kind: over(statistics.fmean, each) for kind, each in by_kind.items()}


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


def _agreeing_seconds(world: World, host_of: Sequence[str]) -> float:
    """What comparing batches, and hearing of the loss, takes of a step."""
    if len(set(host_of)) == 1:
        return _STEP_SECONDS
    took = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        world.gather_numbers([0] * 4)
        heard = world.broadcast(torch.zeros((), device=world.device), world.size - 1)
        if heard is not None:
            heard.wait()
        took.append(time.perf_counter() - start)
    slowest: float = max(world.gather(statistics.median(took)))
    return _STEP_SECONDS + slowest


def _overheads(link: Link, links: Sequence[Probed], op_seconds: float, *, step_seconds: float) -> Overheads:
    def median(numbers: list[float]) -> float:
        return statistics.median(numbers) if numbers else 0.0

    return Overheads(
        op_seconds,
        median([each.parcel_seconds for each in links]),
        median([each.seconds_per_byte for each in links]),
        step_seconds,
        receives_ahead=link.receives_ahead,
        sends_ahead=link.sends_ahead,
    )


def _cluster(
    world: World, host_of: Sequence[str], mine: Device, links: Mapping[tuple[int, int], Probed]
) -> Cluster:
    """The ranks' devices, and the links between neighbours; others are as those of the same sort.

    `host_of` says which ranks share a host.
    """
    devices: list[Device] = world.gather(mine)
    kinds = {each.name: each for each in reversed(devices)}
    ranks = range(world.size)
    known = {pair: each.link for (a, b), each in links.items() for pair in ((a, b), (b, a))}
    inside = [link for (a, b), link in known.items() if host_of[a] == host_of[b]]
    outside = [link for (a, b), link in known.items() if host_of[a] != host_of[b]]
    hosts = []
    for _, group in groupby(ranks, key=lambda rank: host_of[rank]):
        own = tuple(replace(kinds[devices[r].name], memory_bytes=devices[r].memory_bytes) for r in group)
        hosts.append(Host(own, _slowest(inside)))
    return Cluster(tuple(hosts), _slowest(outside), known)


def _slowest(links: Sequence[LinkCost]) -> LinkCost:
    return min(links, key=lambda link: link.bytes_per_second, default=LinkCost())
