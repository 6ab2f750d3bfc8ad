"""Interleaved 1F1B: 1F1B with several stages a rank, dealt out in a loop, which shortens the warm-up.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
2021, arXiv:2104.04473, section 2.2. Microbatches go through in groups: a rank runs a whole group through one
of its stages before the group's next stage. For p ranks, v stages a rank and m >= p microbatches the bubble
is (p - 1) / (v m + p - 1). In return every microbatch changes rank v p - 1 times each way, and rank 0 holds
the activations of up to min(v m, 2 (p - 1) + (v - 1) g + 1) stages, for v > 1 and groups of at most g.

The published form has groups of p and so needs m divisible by p. Here the microbatches are dealt out evenly
to m // p groups of at least p, or to a single one if m < p. For m divisible by p that is the published form,
for one stage a rank it is 1F1B, and the bubble has the same formula for every m >= p. Rejected: groups of p
and a smaller one at the end, which idle longer: 18 slots instead of 9, for p = 4, v = 2, m = 5.
"""

from itertools import pairwise

from evenflow.ir.op import Backward, ComputeOp, Forward
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.schedules.alternate import alternate


def interleaved_1f1b(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the interleaved 1F1B schedule, on a looped placement. Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(interleaved_1f1b(num_ranks=2, stages_per_rank=2, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18  19  20
    rank 0 0F0 0F1 0F2 2F0 2F1 2F2  .  2B0 ---  .  2B1 ---  .  2B2 --- 0B0 --- 0B1 --- 0B2 ---
    rank 1  .  1F0 1F1 1F2 3F0 3B0 --- 3F1 3B1 --- 3F2 3B2 --- 1B0 --- 1B1 --- 1B2 ---  .   .
    """
    placement = Placement.looped(num_ranks, stages_per_rank)
    groups = microbatch_groups(num_ranks, num_microbatches)
    ranks = tuple(_queue(rank, num_ranks, stages_per_rank, groups) for rank in range(num_ranks))
    return Schedule("interleaved-1f1b", placement, num_microbatches, ranks)


def microbatch_groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Return the microbatches in even groups of at least `num_ranks`; the larger ones, by one, stand first.

    >>> microbatch_groups(num_ranks=2, num_microbatches=5)
    [range(0, 3), range(3, 5)]
    """
    num_groups = max(1, num_microbatches // num_ranks)
    size, num_larger = divmod(num_microbatches, num_groups)
    firsts = [group * size + min(group, num_larger) for group in range(num_groups + 1)]
    return [range(first, following) for first, following in pairwise(firsts)]


def _queue(rank: int, num_ranks: int, stages_per_rank: int, groups: list[range]) -> tuple[ComputeOp, ...]:
    stages = range(rank, num_ranks * stages_per_rank, num_ranks)
    forwards = [Forward(stage, microbatch) for group in groups for stage in stages for microbatch in group]
    backwards = [
        Backward(stage, microbatch) for group in groups for stage in reversed(stages) for microbatch in group
    ]
    # The first group passes all stages but the last. Then each rank further from the end needs two forwards
    # more until its first gradient returns; one is enough where no stage follows on the first rank.
    steps_to_end = num_ranks - 1 - rank
    num_warmup = (
        steps_to_end if stages_per_rank == 1 else 2 * steps_to_end + (stages_per_rank - 1) * len(groups[0])
    )
    return tuple(alternate(forwards, backwards, num_warmup))
