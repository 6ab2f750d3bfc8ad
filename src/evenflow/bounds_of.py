"""Bounds of a schedule: what `bounds` says of its placement, sizes and costs, for any order of the ops."""

from dataclasses import replace

from evenflow.bounds import Bounds, instance_of, lower_bounds
from evenflow.ir.costs import Costs
from evenflow.ir.op import Overlap
from evenflow.ir.schedule import Schedule


def bounds_of(schedule: Schedule, costs: Costs) -> Bounds | None:
    """Return what no schedule of this placement and these sizes can beat; None for one that only evaluates.

    Raises `ScheduleError` if a rank can't hold one microbatch, `ConfigError` for costs of other stages.

    Where the schedule holds overlaps, each op counts with the share that it takes of one: an overlap is no
    shorter than its two ops so shortened, one after the other.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> bounds_of(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=4), Costs.uniform(2)).span.seconds
    12.0
    """
    if not schedule.trains:
        return None
    if costs.overlap_share < 1 and any(isinstance(op, Overlap) for queue in schedule.ranks for op in queue):
        costs = replace(
            costs,
            forward_seconds=tuple(seconds * costs.overlap_share for seconds in costs.forward_seconds),
            input_grad_seconds=tuple(seconds * costs.overlap_share for seconds in costs.input_grad_seconds),
            weight_grad_seconds=tuple(seconds * costs.overlap_share for seconds in costs.weight_grad_seconds),
        )
    return lower_bounds(instance_of(schedule.placement, schedule.num_microbatches, costs))
