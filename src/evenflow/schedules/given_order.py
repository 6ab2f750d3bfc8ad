"""A given order of forwards and input gradients, and weight gradients in its gaps.

Shared by the methods that fix that order for each rank. Weight gradients wait for gaps (see `gap_filling`) as
long as memory lasts; where it doesn't, the oldest runs to make room.
"""

from collections.abc import Sequence
from typing import TypeAlias

from evenflow.ir.op import ComputeOp, Forward, WeightGrad
from evenflow.ir.placement import Placement
from evenflow.schedules.gap_filling import Kind, Pace, Progress, Turn, fill

Order: TypeAlias = Sequence[tuple[Kind, int]]
"""One rank's forwards and input gradients: the kind and the stage of each, in their order."""


def fill_order(
    placement: Placement, num_microbatches: int, orders: Sequence[Order], limit: int, pace: Pace
) -> tuple[tuple[ComputeOp, ...], ...]:
    """Return each rank's queue, holding at most `limit` activations of a stage.

    `orders[rank]` never runs more than `limit` forwards ahead of its input gradients.

    >>> from evenflow.ir.op import InputGrad
    >>> order = [(Forward, 0), (Forward, 0), (InputGrad, 0), (Forward, 0), (InputGrad, 0), (InputGrad, 0)]
    >>> print(*fill_order(Placement.linear(1), 3, [order], limit=2, pace=Pace(1, 0))[0])
    0F0 0F1 0I0 0W0 0F2 0I1 0I2 0W1 0W2
    """
    stages = [placement.stages_on(rank) for rank in range(placement.num_ranks)]

    def choose(progress: Progress, rank: int, now: int) -> Turn | None:
        on_rank = stages[rank]
        at = sum(
            len(progress.forward_ends[stage]) + len(progress.input_grad_ends[stage]) for stage in on_rank
        )
        if at == len(orders[rank]):
            return None
        kind, stage = orders[rank][at]
        if kind is Forward and sum(map(progress.held, on_rank)) == limit:
            return Turn(WeightGrad, progress.pending[rank][0], now)
        arrival = progress.arrival(kind, stage)
        return None if arrival is None else Turn(kind, stage, arrival)

    return fill(placement, num_microbatches, choose, pace)
