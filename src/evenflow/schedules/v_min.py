"""V-Min: two stages a rank in a V and split backwards, with about a third of 1F1B's activations.

Source: Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, arXiv:2405.15362.
Every rank holds at most 2 floor(p / 3) + 4 activations of a stage, p / 3 + 2 microbatches, for p ranks, and
never more than under V-Half, and less for p = 5 and from p = 7 on. One microbatch waits for the next at
nearly every transfer: for p = 8, 32 microbatches and equal F, I and W the longest busy window idles for
11.5 %, and for 24.5 % with transfers of a tenth of a rank's F.
"""

from evenflow.ir.schedule import Schedule
from evenflow.schedules.sizes import v_placement
from evenflow.schedules.v_shape import v_queues


def v_min(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the V-Min schedule, on a V-shaped placement.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank` other than 2.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(v_min(num_ranks=4, stages_per_rank=2, num_microbatches=2)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18
    rank 0 0F0 0F1  .   .   .   .   .  7F0 7I0 7F1 7I1 7W0 7W1  .   .  0I0 0W0 0I1 0W1
    rank 1  .  1F0 1F1  .   .   .  6F0  .  6F1 6I0 6W0 6I1 6W1  .  1I0 1W0 1I1 1W1  .
    rank 2  .   .  2F0 2F1  .  5F0  .  5F1  .   .  5I0 5W0 5I1 2I0 5W1 2I1 2W0 2W1  .
    rank 3  .   .   .  3F0 4F0 3F1 4F1  .   .   .   .  4I0 3I0 4I1 3I1 4W0 3W0 4W1 3W1
    """
    placement = v_placement("v-min", num_ranks, stages_per_rank)
    limit = min(2 * num_ranks, num_ranks + 2, 2 * (num_ranks // 3) + 4)
    return Schedule("v-min", placement, num_microbatches, v_queues(placement, num_microbatches, limit))
