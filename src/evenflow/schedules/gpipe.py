"""GPipe: every microbatch forward, then every microbatch backward.

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019,
arXiv:1811.06965. For p ranks, m microbatches and one stage a rank, the bubble is (p - 1) / (m + p - 1), and a
stage holds the activations of all m microbatches.

With several stages a rank, placed in a loop, a rank runs every microbatch through one of its stages before
the next. That is the breadth-first schedule, which the catalog has under its own name: see `looped_bfs`.

Deviation from the paper: backwards keep the order of the microbatches, where GPipe's figure reverses it,
because gradients then accumulate in the same order under every schedule. The length is the same.
"""

from evenflow.ir.op import Backward, ComputeOp, Forward
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule


def gpipe(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the GPipe schedule, on a looped placement. Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11
    rank 0 0F0 0F1 0F2  .   .   .  0B0 --- 0B1 --- 0B2 ---
    rank 1  .  1F0 1F1 1F2 1B0 --- 1B1 --- 1B2 ---  .   .
    """
    placement = Placement.looped(num_ranks, stages_per_rank)
    ranks = tuple(_queue(placement.stages_on(rank), num_microbatches) for rank in range(num_ranks))
    return Schedule("gpipe", placement, num_microbatches, ranks)


def _queue(stages: tuple[int, ...], num_microbatches: int) -> tuple[ComputeOp, ...]:
    microbatches = range(num_microbatches)
    forwards = [Forward(stage, microbatch) for stage in stages for microbatch in microbatches]
    backwards = [Backward(stage, microbatch) for stage in reversed(stages) for microbatch in microbatches]
    return (*forwards, *backwards)
