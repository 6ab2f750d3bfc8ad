"""Bounds of a schedule: what `bounds` says of its placement, sizes and costs, for any order of the ops."""

import math
from dataclasses import replace
from functools import partial

from evenflow.bounds import Bounds, Instance, lower_bounds
from evenflow.ir.costs import Costs
from evenflow.ir.op import Overlap
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule


def instance_of(placement: Placement, num_microbatches: int, costs: Costs) -> Instance:
    """Return what is to be scheduled, for a chain of stages: ops, delays between ranks, memory and caps.

    >>> instance = instance_of(Placement.v_shape(2), 4, Costs.uniform(4, latency_seconds=0.5))
    >>> instance.up_seconds, instance.caps
    ((0.5, 0.0, 0.5), (None, None))
    """
    delay = partial(costs.delay_seconds, placement=placement)
    lower_stages = range(placement.num_stages - 1)
    caps = costs.memory_caps or (math.inf,) * placement.num_ranks
    return Instance(
        placement.rank_of,
        num_microbatches,
        costs.forward_seconds,
        costs.input_grad_seconds,
        costs.weight_grad_seconds,
        up_seconds=tuple(delay(stage, stage + 1) for stage in lower_stages),
        down_seconds=tuple(delay(stage + 1, stage) for stage in lower_stages),
        held_memory=costs.activation_bytes,
        kept_memory=costs.weight_grad_bytes,
        caps=tuple(cap if math.isfinite(cap) else None for cap in caps),
    )


def bounds_of(schedule: Schedule, costs: Costs) -> Bounds | None:
    """Return what no schedule of this placement and these sizes can beat; None for one that only evaluates.

    Raises `ScheduleError` if a rank can't hold one microbatch.

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
