"""ZB-H2: no bubble at all between equal ops, for about twice 1F1B's memory.

Source: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 2.3.
More forwards fill the wait for the first gradient, and the weight gradients that are held back fill the end.
For p ranks, every rank holds at most 2 p - 1 microbatches. Where a forward, an input and a weight gradient
take the same time, transfers none, and there are m >= 2 p - 1 microbatches, no busy window has a gap. The
*makespan* still has a bubble of (p - 1) / (3 m + p - 1), in which the last rank waits for its first
microbatch: the next step fills it if no barrier parts the steps, as the paper's section 4 arranges.
"""

from evenflow.ir.schedule import Schedule
from evenflow.schedules.sizes import one_stage_a_rank
from evenflow.schedules.zero_bubble import split_queue


def zb_h2(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the ZB-H2 schedule, one stage a rank.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank > 1`.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(zb_h2(num_ranks=3, stages_per_rank=1, num_microbatches=5)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16
    rank 0 0F0 0F1 0F2 0F3 0F4 0I0 0W0 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4  .   .
    rank 1  .  1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1I3 1W1 1I4 1W2 1W3 1W4  .
    rank 2  .   .  2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2W1 2W2 2W3 2W4
    """
    placement = one_stage_a_rank("zb-h2", num_ranks, stages_per_rank)
    # The first gradient is 2 (p - 1 - r) ops away, up the ranks and back: as many forwards fill the wait.
    # All ranks hold equally much if the weight gradients that wait make up for the forwards that do not.
    ranks = tuple(
        split_queue(rank, num_microbatches, num_warmup=2 * (num_ranks - 1 - rank), num_deferred=2 * rank)
        for rank in range(num_ranks)
    )
    return Schedule("zb-h2", placement, num_microbatches, ranks)
