"""The devices of a pipeline's processes: their memory, how full it is, and which of them are one rank's."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from evenflow.cost.local_device import memory_bytes_of
from evenflow.pipe.step.parts import Parts
from evenflow.runtime.notes.processes import this_host

T = TypeVar("T")


def gpus_of(parts: Parts) -> frozenset[torch.device]:
    """The GPUs that this process computes on; none where it computes on the CPU."""
    devices = frozenset(stage.device for stage in parts.stages.values())
    return devices if all(device.type == "cuda" for device in devices) else frozenset()


def own_cap_bytes(parts: Parts) -> float | None:
    """What there is of memory for this process, as it knows without asking: by the plan, or of its GPUs.

    None on the CPU, whose memory belongs to all that runs on the host.
    """
    if parts.plan is not None and parts.world.size > 1:
        return parts.plan.ranks[parts.world.rank].cap_bytes
    return sum(map(memory_bytes_of, gpus_of(parts))) or None


def caps_bytes(parts: Parts) -> tuple[float, ...]:
    """The same for each rank, those on the CPU with their share of what their host has; a collective call.

    None at all where ranks without a plan take turns in one process.
    """
    if parts.plan is not None:
        return tuple(rank.cap_bytes for rank in parts.plan.ranks)
    if parts.world.size == 1:
        return ()
    own = own_cap_bytes(parts)
    mine = (this_host(), own is None, memory_bytes_of(torch.device("cpu")) if own is None else own)
    places: list[tuple[str, bool, float]] = parts.world.gather(mine)
    hosts = [host for host, _, _ in parts.mesh.world.gather(mine)]
    return tuple(memory / (hosts.count(host) if is_shared else 1) for host, is_shared, memory in places)


def fullness(held_bytes: float | None, cap_bytes: float | None) -> float:
    """What to compare ranks by: the share of their memory that they hold, or bytes where no cap is known.

    >>> fullness(30.0, 80.0) < fullness(20.0, 24.0)
    True
    """
    return (held_bytes or 0.0) / (cap_bytes or 1.0)


def num_replicas(parts: Parts) -> int:
    """How many processes hold the same stages: data and tensor ranks."""
    return parts.mesh.data.size * parts.mesh.tensor.size


def of_each_rank(processes: Sequence[T], num_replicas: int) -> list[Sequence[T]]:
    """What all processes say, those of each rank of the pipeline together: processes are numbered so.

    >>> of_each_rank("aabb", 2)
    ['aa', 'bb']
    """
    return [processes[at : at + num_replicas] for at in range(0, len(processes), num_replicas)]
