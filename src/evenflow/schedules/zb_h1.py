"""ZB-H1: 1F1B with its memory and a third of its bubble, by holding weight gradients back.

Source: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 2.3. For
p ranks, every rank holds at most p microbatches, which is 1F1B's peak on rank 0. For m >= p microbatches and
equal stages, whose forwards, input and weight gradients take F, I and W seconds with W <= F and W <= I, the
longest busy window idles (p - 1) (F + I - W), where 1F1B's idles (p - 1) (F + I + W): a third if F = I = W.
"""

from evenflow.ir.schedule import Schedule
from evenflow.schedules.sizes import one_stage_a_rank
from evenflow.schedules.zero_bubble import split_queue


def zb_h1(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the ZB-H1 schedule, one stage a rank.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank > 1`.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(zb_h1(num_ranks=3, stages_per_rank=1, num_microbatches=4)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13
    rank 0 0F0 0F1 0F2  .   .  0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1  .  1F0 1F1  .  1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2  .   .  2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """
    placement = one_stage_a_rank("zb-h1", num_ranks, stages_per_rank)
    # Rank r holds r forwards less than rank 0, so as many weight gradients can wait in their place.
    ranks = tuple(
        split_queue(rank, num_microbatches, num_warmup=num_ranks - 1 - rank, num_deferred=rank)
        for rank in range(num_ranks)
    )
    return Schedule("zb-h1", placement, num_microbatches, ranks)
