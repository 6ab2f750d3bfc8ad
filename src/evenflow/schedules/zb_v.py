"""ZB-V: two stages a rank in a V and split backwards, with 1F1B's memory and no bubble between equal ops.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 6. For p ranks,
every rank holds at most 2 p activations of a stage, p microbatches. Where a forward, an input and a weight
gradient take the same time, transfers none, and there are m >= 2 p - 1 microbatches, no busy window has a
gap. The *makespan* still has a bubble of (p - 1) / (6 m + p - 1), in which the last rank waits for its first
microbatch. With transfers of a tenth of a rank's F, p = 8 and m = 32, the longest busy window idles for 4 %.

The published form asks for m >= 2 p - 1. Here fewer microbatches run in the order of 2 p - 1 from which the
others are struck out, and their weight gradients fill the gaps that this leaves.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import count

from evenflow.ir.op import Forward, InputGrad, WeightGrad
from evenflow.ir.schedule import Schedule
from evenflow.schedules.gap_filling import Kind, Pace
from evenflow.schedules.given_order import fill_order
from evenflow.schedules.sizes import v_placement

_KINDS: dict[str, Kind] = {"F": Forward, "I": InputGrad, "W": WeightGrad}


def zb_v(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the ZB-V schedule, on a V-shaped placement.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank` other than 2.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(zb_v(num_ranks=2, stages_per_rank=2, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18
    rank 0 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2  .
    rank 1  .  1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    placement = v_placement("zb-v", num_ranks, stages_per_rank)
    published = max(num_microbatches, 2 * num_ranks - 1)
    ranks = tuple(
        tuple(op for op in _queue(rank, num_ranks, published) if op.microbatch < num_microbatches)
        for rank in range(num_ranks)
    )
    if num_microbatches == published:
        return Schedule("zb-v", placement, num_microbatches, ranks)
    orders = [[(type(op), op.stage) for op in queue if not isinstance(op, WeightGrad)] for queue in ranks]
    # Transfers are short, but the clock sees the gaps that they make.
    pace = Pace(op_ticks=20, transfer_ticks=1)
    filled = fill_order(placement, num_microbatches, orders, limit=2 * num_ranks, pace=pace)
    return Schedule("zb-v", placement, num_microbatches, filled)


def _queue(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Forward | InputGrad | WeightGrad]:
    """One rank's ops, for at least `2 * num_ranks - 1` microbatches."""
    to_turn = num_ranks - 1 - rank
    # Capitals stand for the stage on the way down, small letters for the one on the way up.
    letters = (
        "F" * (2 * to_turn + 1)
        + "fF" * rank
        + "fiw" * (to_turn + 1)
        + "FIWfiw" * (num_microbatches - 2 * num_ranks + 1 + rank)
        + "IWfiw" * to_turn
        + "Ii" * rank
        + "IW" * (to_turn + 1)
        + "w" * rank
        + "W" * rank
    )
    microbatches: defaultdict[str, Iterator[int]] = defaultdict(count)
    for letter in letters:
        stage = rank if letter.isupper() else 2 * num_ranks - 1 - rank
        yield _KINDS[letter.upper()](stage, next(microbatches[letter]))
