"""How far the clocks of several hosts are apart: what is laid on one time axis must be read on one clock.

Each rank sends the first one its time, for which that has asked: it was read between the question and the
answer, in the middle if both took as long. Of several rounds the quickest counts, for it leaves least room.
Source: Cristian, "Probabilistic clock synchronization", Distributed Computing 3, 1989.
"""

import time

import torch

from evenflow.runtime.notes.processes import this_host
from evenflow.runtime.ranks.world import World

_ROUNDS = 16


def clock_offset(world: World) -> float:
    """Seconds by which this rank's clock is ahead of the first rank's; collective. 0 where all share a host.

    >>> from evenflow.runtime.ranks.world import SingleProcess
    >>> clock_offset(SingleProcess())
    0.0
    """
    if len(set(world.gather(this_host()))) == 1:
        return 0.0
    offsets = [0.0] * world.size
    for other in range(1, world.size):
        rounds = [_asked(world, other) for _ in range(_ROUNDS)]
        offsets[other] = min(rounds)[1]
    found: list[float] = world.share(offsets, 0)
    return found[world.rank]


def _asked(world: World, other: int) -> tuple[float, float]:
    """One round between the first rank and another: seconds there and back, and the other's lead."""
    token = torch.zeros(1, dtype=torch.float64, device=world.device)
    if world.rank == other:
        world.receive(token, 0)
        world.send(token + time.perf_counter(), 0)
    if world.rank != 0:
        return 0.0, 0.0
    asked = time.perf_counter()
    world.send(token, other)
    told = float(world.receive(token, other))
    answered = time.perf_counter()
    return answered - asked, told - (asked + answered) / 2
