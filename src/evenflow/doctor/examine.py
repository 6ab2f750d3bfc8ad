"""The examination, as every rank makes it: pair after pair, each in turn, so that none disturbs another."""

import itertools
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch hands it on

from evenflow.cost.local_device import flops_per_second_of, memory_bytes_of
from evenflow.doctor.exchange import Exchange
from evenflow.doctor.worker import Fault, Meeting, Worker
from evenflow.runtime.notes.processes import this_host
from evenflow.runtime.ranks import network
from evenflow.runtime.ranks.world import ProcessGroupWorld, World

_MAX_PAIRS = 28  # of 8 ranks: a second or two each on GPUs


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank knows of itself and of its host."""

    host: str
    device: str
    device_name: str
    memory_bytes: float
    flops_per_second: float  # of a product of matrices in float32
    peers: tuple[int, ...]  # local numbers of the GPUs whose memory this one reaches
    shared_memory_bytes: float
    interfaces: tuple[str, ...]
    iommu: bool
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found: each rank's place, and each pair's link. A pair is (lower rank, higher rank)."""

    places: tuple[Place, ...]
    links: Mapping[tuple[int, int], Exchange | Fault]


def examine(kind: str, local_rank: int, settings: Mapping[str, str], timeout_seconds: float) -> Examination:
    """Examine all links; every rank calls it, with its number on its host, and gets the same.

    `kind` is "cpu" or "cuda". A link that does not answer within the timeout is a `Fault`, and the others
    are still measured.
    """
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", local_rank)
    # The ranks talk about their work over Gloo: on GPUs that works where NCCL does not.
    address = network.join("gloo", timedelta(seconds=600))
    world = ProcessGroupWorld(torch.device("cpu"))
    places = told_apart(world.gather((this_host(), _place(device, settings))))
    first: str = world.share(address, 0)
    with Worker(str(device), "gloo" if kind == "cpu" else "nccl") as worker:
        return Examination(places, measure_links(world, worker, first, timeout_seconds=timeout_seconds))


def told_apart(places: Sequence[tuple[str, Place]]) -> tuple[Place, ...]:
    """Each rank's place, with its host (see `this_host`); the second host of one name is called NAME#2."""
    of_name: dict[str, list[str]] = {}
    named = []
    for host, place in places:
        hosts = of_name.setdefault(place.host, [])
        if host not in hosts:
            hosts.append(host)
        number = hosts.index(host)
        named.append(replace(place, host=f"{place.host}#{number + 1}") if number else place)
    return tuple(named)


def measure_links(
    world: World, worker: Worker, first_host: str, *, timeout_seconds: float
) -> dict[tuple[int, int], Exchange | Fault]:
    """Measure pair after pair, each rank with its worker; they meet at rank 0's host, under that address."""
    store, port = None, 0
    if world.rank == 0:
        store = TCPStore(first_host, 0, is_master=True, wait_for_workers=False)
        port = store.port
    port = world.share(port, 0)
    links: dict[tuple[int, int], Exchange | Fault] = {}
    for pair in pairs(world.size):
        mine: Exchange | Fault | None = None
        if world.rank in pair:
            meeting = Meeting(first_host, port, f"{pair[0]}-{pair[1]}", pair.index(world.rank))
            mine = worker.measure(meeting, timeout_seconds=timeout_seconds)
        found = world.gather(mine)  # so the next pair begins when this one has ended
        links[pair] = _both(found[pair[0]], found[pair[1]])
    return links


def pairs(num_ranks: int) -> list[tuple[int, int]]:
    """Return the pairs to measure: all of few ranks, of many each with the next.

    >>> pairs(3)
    [(0, 1), (0, 2), (1, 2)]
    >>> len(pairs(64))
    64
    """
    everyone = list(itertools.combinations(range(num_ranks), 2))
    if len(everyone) <= _MAX_PAIRS:
        return everyone
    return [*itertools.pairwise(range(num_ranks)), (0, num_ranks - 1)]


def _both(first: Exchange | Fault, second: Exchange | Fault) -> Exchange | Fault:
    """What the two sides found; the one that knows more of a fault is heard."""
    faults = [each for each in (first, second) if isinstance(each, Fault)]
    if not faults:
        return first
    return min(faults, key=lambda fault: ("WrongData" not in fault.reason, "no answer" in fault.reason))


def _place(device: torch.device, settings: Mapping[str, str]) -> Place:
    shared_memory = Path("/dev/shm")
    groups = Path("/sys/kernel/iommu_groups")
    return Place(
        host=socket.gethostname(),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU core",
        memory_bytes=memory_bytes_of(device) / (1 if device.type == "cuda" else os.cpu_count() or 1),
        flops_per_second=flops_per_second_of(device),
        peers=_peers(device),
        shared_memory_bytes=float(shutil.disk_usage(shared_memory).total) if shared_memory.exists() else 0.0,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        iommu=groups.is_dir() and any(groups.iterdir()),
        settings=dict(settings),
    )


def _peers(device: torch.device) -> tuple[int, ...]:
    if device.type != "cuda":
        return ()
    others: Sequence[int] = range(torch.cuda.device_count())
    return tuple(
        each
        for each in others
        if each != device.index and torch.cuda.can_device_access_peer(device.index or 0, each)
    )
