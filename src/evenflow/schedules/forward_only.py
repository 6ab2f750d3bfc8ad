"""Forward only: every microbatch forward, and nothing back; for evaluation and prediction.

It is the first half of GPipe (Huang et al., 2019, arXiv:1811.06965), in the breadth-first order where a rank
has several stages (Lamy-Poirier, 2023, arXiv:2211.05953). For p ranks with one stage each and m microbatches
the bubble is (p - 1) / (m + p - 1). A stage holds nothing once its outputs are gone.
"""

from evenflow.ir.op import ComputeOp, Forward
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule


def forward_only(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the forward-only schedule, on a looped placement. Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(forward_only(num_ranks=2, stages_per_rank=2, num_microbatches=3)))
    time   0   1   2   3   4   5   6
    rank 0 0F0 0F1 0F2 2F0 2F1 2F2  .
    rank 1  .  1F0 1F1 1F2 3F0 3F1 3F2
    """
    return forward_only_on(Placement.looped(num_ranks, stages_per_rank), num_microbatches)


def forward_only_on(placement: Placement, num_microbatches: int) -> Schedule:
    """Return the forward-only schedule on a placement of any form; `ConfigError` for no microbatch.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(forward_only_on(Placement.v_shape(2), num_microbatches=3)))
    time   0   1   2   3   4   5   6   7
    rank 0 0F0 0F1 0F2  .   .  3F0 3F1 3F2
    rank 1  .  1F0 1F1 1F2 2F0 2F1 2F2  .
    """
    stages = (placement.stages_on(rank) for rank in range(placement.num_ranks))
    ranks = tuple(_queue(held, num_microbatches) for held in stages)
    return Schedule("forward-only", placement, num_microbatches, ranks)


def _queue(stages: tuple[int, ...], num_microbatches: int) -> tuple[ComputeOp, ...]:
    return tuple(Forward(stage, microbatch) for stage in stages for microbatch in range(num_microbatches))
