"""Which link joins the ranks of a pipeline."""

import torch

from evenflow.ir.placement import Placement
from evenflow.runtime.links.by_rank import LinkByRank
from evenflow.runtime.links.link import Link
from evenflow.runtime.links.local import LocalLink
from evenflow.runtime.links.neighbours import neighbours
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.links.shared_memory import SharedMemoryLink
from evenflow.runtime.world import World, timeout_seconds


def link_for(world: World, device: torch.device, placement: Placement) -> Link:
    """Shared memory between CPU ranks of one host, torch.distributed between all others; collective."""
    if world.size == 1:
        return LocalLink()
    sockets = neighbours(world) if device.type == "cpu" else None
    if not sockets:
        return ProcessGroupLink(device, placement)
    near = SharedMemoryLink(placement, world.rank, sockets, timeout_seconds=timeout_seconds())
    if len(sockets) == world.size - 1:
        return near
    return LinkByRank(placement, dict.fromkeys(sockets, near), ProcessGroupLink(device, placement))
