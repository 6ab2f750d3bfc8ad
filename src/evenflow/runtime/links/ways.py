"""Ways: a group of torch.distributed for each direction between two ranks.

NCCL serves the transfers of two ranks in a group one after the other, whichever way they go: an activation
would wait behind a gradient that comes the other way. With a group, and so a communicator, for each direction
they pass each other. More would cost memory.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeAlias

import torch.distributed as dist

from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement

Way: TypeAlias = tuple[int, int]  # the sending rank, the receiving rank, among all processes


def ways(
    flow: Flow,
    placement: Placement,
    timeout_seconds: float,
    made: dict[Way, dist.ProcessGroup],
    replicas: Sequence[Sequence[int]],
) -> Mapping[Way, dist.ProcessGroup]:
    """This rank's groups for what stages of other ranks and its own hand each other; collective.

    `replicas` tells what the ranks of each replica of the pipeline are called among all processes of the run,
    all of which call this. Groups in `made` are used again, and new ones put there.
    """
    rank_of = placement.rank_of
    pairs = {
        (rank_of[a], rank_of[b]) for a, b in (*flow.activations, *flow.gradients) if rank_of[a] != rank_of[b]
    }
    named = {(ranks[a], ranks[b]) for a, b in pairs for ranks in replicas}
    for pair in sorted(named):  # all ranks make all groups, in one order
        if pair not in made:
            waits = timedelta(seconds=timeout_seconds)
            made[pair] = dist.new_group(sorted(pair), timeout=waits, group_desc="{}>{}".format(*pair))
    return {pair: group for pair, group in made.items() if dist.get_rank() in pair}
