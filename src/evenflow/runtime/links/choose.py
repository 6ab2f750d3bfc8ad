"""Which link joins the ranks of a pipeline, and how else they talk."""

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist

from evenflow.errors import ConfigError
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.runtime.links.by_rank import LinkByRank
from evenflow.runtime.links.link import Link
from evenflow.runtime.links.local import LocalLink
from evenflow.runtime.links.neighbours import neighbours
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.links.shared_memory import SharedMemoryLink
from evenflow.runtime.links.ways import Way, ways
from evenflow.runtime.ranks.roll_call import RollCall
from evenflow.runtime.ranks.world import World, backend_of, timeout_seconds

_LOG = logging.getLogger(__name__)
CHOICES = ("auto", "shared-memory", "torch")


def link_for(
    world: World,
    device: torch.device,
    placement: Placement,
    choice: str = "auto",
    *,
    flow: Flow | None = None,
) -> Link:
    """Shared memory between CPU ranks of one host, torch.distributed between all others; collective.

    With "torch" that between all. With "shared-memory" it raises `ConfigError` where two ranks have none.
    `flow` says which stages hand each other values, by default each the next.
    """
    if world.size == 1:
        return LocalLink()
    sockets = neighbours(world) if device.type == "cpu" and choice != "torch" else None
    num_near = len(sockets or ())
    if choice == "shared-memory" and num_near < world.size - 1:
        raise ConfigError(
            f"link='shared-memory' needs all ranks on the CPUs of one host that runs Linux; of {world.size}, "
            f"rank {world.rank} on {device.type} reaches {num_near} others so: leave link= out"
        )
    if world.is_first:
        with_all = {0: "torch.distributed", world.size - 1: "shared memory"}
        kind = with_all.get(num_near, "shared memory on this host and torch.distributed to others")
        _LOG.info("tensors travel between ranks over %s", kind)
    if not sockets:
        own = _own_ways(world, placement, flow)
        return ProcessGroupLink(device, placement, world.device, own, world.members)
    near = SharedMemoryLink(placement, world.rank, sockets, timeout_seconds=timeout_seconds(device))
    if num_near == world.size - 1:
        return near
    far = ProcessGroupLink(device, placement, members=world.members)
    return LinkByRank(placement, dict.fromkeys(sockets, near), far)


def _own_ways(world: World, placement: Placement, flow: Flow | None) -> Mapping[Way, dist.ProcessGroup]:
    if backend_of(world.device) != "nccl":
        return {}
    used = flow or Flow.chain(placement.num_stages)
    return ways(used, placement, timeout_seconds(world.device), world.ways, world.parts)


def roll_call_for(world: World, link: Link) -> RollCall | None:
    """A roll call, where shared memory leads to all these ranks, as this rank's link may; collective."""
    if not all(world.gather(isinstance(link, SharedMemoryLink))):
        return None
    sockets = neighbours(world) or {}
    if 0 < len(sockets) == world.size - 1:
        return RollCall(sockets, world.rank, timeout_seconds=timeout_seconds(torch.device("cpu")))
    for each in sockets.values():
        each.close()
    return None
