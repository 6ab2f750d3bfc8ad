"""Eager 1F1B: 1F1B with more forwards in flight, so that a transfer has time to arrive.

Source: Zhuang et al., "On Optimizing the Communication of Model Parallelism", MLSys 2023, arXiv:2211.05322,
section 4 ("eager-1F1B"). Rank r of p warms up with two forwards for each rank behind it, where 1F1B has one,
and so holds at most 2 (p - 1 - r) + 1 microbatches. Without transfers the bubble is 1F1B's,
(p - 1) / (m + p - 1) for m microbatches. With transfers 1F1B waits in every round; this one waits only while
the pipeline fills and drains, as long as a transfer takes no longer than half of a rank's forward and
backward.
"""

from evenflow.ir.schedule import Schedule
from evenflow.schedules.one_f_one_b import alternating_queue
from evenflow.schedules.sizes import one_stage_a_rank


def eager_1f1b(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the eager 1F1B schedule, one stage a rank.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank > 1`.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(eager_1f1b(num_ranks=3, stages_per_rank=1, num_microbatches=5)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18  19  20
    rank 0 0F0 0F1 0F2 0F3 0F4  .   .  0B0 ---  .  0B1 ---  .  0B2 ---  .  0B3 ---  .  0B4 ---
    rank 1  .  1F0 1F1 1F2  .  1B0 --- 1F3 1B1 --- 1F4 1B2 ---  .  1B3 ---  .  1B4 ---  .   .
    rank 2  .   .  2F0 2B0 --- 2F1 2B1 --- 2F2 2B2 --- 2F3 2B3 --- 2F4 2B4 ---  .   .   .   .
    """
    placement = one_stage_a_rank("eager-1f1b", num_ranks, stages_per_rank)
    ranks = tuple(
        alternating_queue(rank, num_microbatches, num_warmup=2 * (num_ranks - 1 - rank))
        for rank in range(num_ranks)
    )
    return Schedule("eager-1f1b", placement, num_microbatches, ranks)
