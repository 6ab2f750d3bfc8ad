"""Interleaved zero bubble: interleaved 1F1B with split backwards, and a shorter warm-up that holds less.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, for the split backward;
torch's `ScheduleInterleavedZeroBubble` joins it to the order of Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM", 2021, arXiv:2104.04473. Weight gradients wait for
gaps as long as memory lasts. For p ranks, v stages a rank and groups of at most g microbatches (see
`interleaved_1f1b`) a rank holds at most (v - 1) g + p activations of a stage: p microbatches where p divides
m. For p = 8, v = 4, 32 microbatches and equal F, I and W the longest busy window idles for 1.8 %, and for
6.8 % with transfers of a tenth of a rank's F.
"""

from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad
from evenflow.ir.schedule import Schedule
from evenflow.schedules.alternate import alternate
from evenflow.schedules.gap_filling import Kind, Pace
from evenflow.schedules.given_order import Order, fill_order
from evenflow.schedules.interleaved_1f1b import interleaved_1f1b, microbatch_groups


def interleaved_zb(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the interleaved zero-bubble schedule, on a looped placement.

    Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(interleaved_zb(num_ranks=2, stages_per_rank=2, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18
    rank 0 0F0 0F1 0F2 2F0 2F1  .  2I0 2W0 2F2 2I1 2W1 2I2 0I0 0I1 0I2 2W2 0W0 0W1 0W2
    rank 1  .  1F0 1F1 1F2 3F0 3I0 3F1 3I1 3W0 3F2 3I2 1I0 1I1 1I2 3W1 3W2 1W0 1W1 1W2
    """
    whole = interleaved_1f1b(num_ranks, stages_per_rank, num_microbatches)
    before_last = (stages_per_rank - 1) * len(microbatch_groups(num_ranks, num_microbatches)[0])
    # A rank is one forward ahead of the next. Interleaved 1F1B is two ahead, and holds that much more.
    orders = [
        _split(queue, num_warmup=before_last + num_ranks - 1 - rank) for rank, queue in enumerate(whole.ranks)
    ]
    # A transfer takes a tenth of a rank's forward.
    pace = Pace(op_ticks=10, transfer_ticks=stages_per_rank)
    ranks = fill_order(whole.placement, num_microbatches, orders, before_last + num_ranks, pace)
    return Schedule("interleaved-zb", whole.placement, num_microbatches, ranks)


def _split(queue: tuple[ComputeOp, ...], num_warmup: int) -> Order:
    """A queue's ops in another turn: so many forwards, then an input gradient after each of the others."""
    forwards: list[tuple[Kind, int]] = [(Forward, op.stage) for op in queue if isinstance(op, Forward)]
    input_grads: list[tuple[Kind, int]] = [(InputGrad, op.stage) for op in queue if isinstance(op, Backward)]
    return alternate(forwards, input_grads, num_warmup)
