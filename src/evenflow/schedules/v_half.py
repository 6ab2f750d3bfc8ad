"""V-Half: two stages a rank in a V and split backwards, with about half of 1F1B's activations.

Source: Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, arXiv:2405.15362.
For p ranks, every rank holds at most p + 2 activations of a stage, p / 2 + 1 microbatches, where 1F1B's rank
0 holds p. For p = 8, 32 microbatches and equal F, I and W the longest busy window idles for 8.1 %, and for
12.0 % with transfers of a tenth of a rank's F.
"""

from evenflow.ir.schedule import Schedule
from evenflow.schedules.sizes import v_placement
from evenflow.schedules.v_shape import v_queues


def v_half(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the V-Half schedule, on a V-shaped placement.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank` other than 2.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(v_half(num_ranks=3, stages_per_rank=2, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18  19  20
    rank 0 0F0 0F1 0F2  .   .  5F0 5I0 5F1 5I1 5W0 5W1  .  5F2 5I2 0I0 5W2 0I1 0W0 0I2 0W1 0W2
    rank 1  .  1F0 1F1 1F2 4F0  .  4F1 4I0 4W0 4I1 4W1 4F2 1I0 1W0 4I2 1I1 4W2 1I2 1W1 1W2  .
    rank 2  .   .  2F0 3F0 2F1 3F1 2F2  .  3I0 3W0 3F2 2I0 3I1 2I1 2W0 3I2 2I2 3W1 2W1 3W2 2W2
    """
    placement = v_placement("v-half", num_ranks, stages_per_rank)
    ranks = v_queues(placement, num_microbatches, limit=min(2 * num_ranks, num_ranks + 2))
    return Schedule("v-half", placement, num_microbatches, ranks)
