"""Memory: what the activations of a schedule hold on each rank. A function of the order of ops alone.

A forward allocates its stage's `activation_bytes` when it starts; an input gradient frees all of them but
`weight_grad_bytes` when it ends, and a weight gradient frees those. Source: Qi et al., "Zero Bubble Pipeline
Parallelism", ICLR 2024, section 3.1. Weights, optimizer states and boundary buffers are not counted here.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import assert_never

from evenflow.ir.costs import ROUNDING, Costs
from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Timeline
from evenflow.rules import Result, results
from evenflow.soundness import check_costs


def peak_bytes(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    """Return the most that each rank holds at any moment, in the unit of the costs.

    Raises `ConfigError` for costs of another number of stages.

    >>> from evenflow.schedules.one_f_one_b import one_f_one_b
    >>> peak_bytes(one_f_one_b(num_ranks=3, stages_per_rank=1, num_microbatches=6), Costs.uniform(3))
    (3.0, 2.0, 1.0)
    """
    check_costs(schedule.placement, costs)
    return tuple(max(_held_bytes(queue, costs)) for queue in schedule.ranks)


def memory_faults(schedule: Schedule, costs: Costs) -> list[str]:
    """Return a fault for each rank that holds more than its cap, naming the first op and the highest peak.

    Raises `ConfigError` for costs of another number of stages or caps of another number of ranks.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> from dataclasses import replace
    >>> costs = replace(Costs.uniform(2), memory_caps=(3.0, 1.0))
    >>> print(*memory_faults(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=3), costs))
    rank 1 holds 2 in 1F1, over its cap of 1 (its peak is 3, in 1F2)
    """
    check_costs(schedule.placement, costs)
    if costs.memory_caps is None:
        return []
    faults = []
    for rank, (queue, cap) in enumerate(zip(schedule.ranks, costs.memory_caps, strict=True)):
        over = [
            (held, op)
            for held, op in zip(_held_bytes(queue, costs), queue, strict=True)
            if held > cap * (1 + ROUNDING) + ROUNDING
        ]
        if over:
            (held, first), (peak, highest) = over[0], max(over, key=lambda pair: pair[0])
            faults.append(
                f"rank {rank} holds {held:g} in {first}, over its cap of {cap:g} "
                f"(its peak is {peak:g}, in {highest})"
            )
    return faults


def memory_curve(timeline: Timeline, costs: Costs, rank: int) -> tuple[tuple[float, float], ...]:
    """Return what one rank holds over time: (seconds, bytes from then on), seconds ascending, from 0 bytes.

    >>> from evenflow.ir.flow import Flow
    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> schedule = gpipe(num_ranks=1, stages_per_rank=1, num_microbatches=2)
    >>> memory_curve(simulate(schedule, Flow.chain(1), Costs.uniform(1)), costs=Costs.uniform(1), rank=0)
    ((0.0, 1.0), (1.0, 2.0), (4.0, 1.0), (6.0, 0.0))
    """
    points = []
    held = 0.0
    for span in timeline.compute_on(rank):
        assert isinstance(span.op, ComputeOp), "`compute_on` yields compute ops alone"
        made = results(span.op)
        if grown := sum(_allocated(result, costs) for result in made):
            held += grown
            points.append((span.start_seconds, held))
        if freed := sum(_freed(result, costs) for result in made):
            held -= freed
            points.append((span.end_seconds, held))
    # Of several changes at one moment, the last says what is held from then on.
    return tuple(
        point for point, following in pairwise([*points, (float("inf"), 0.0)]) if point[0] < following[0]
    )


def _held_bytes(queue: Sequence[ComputeOp], costs: Costs) -> Iterator[float]:
    """What is held while each op runs."""
    held = 0.0
    for op in queue:
        made = results(op)
        held += sum(_allocated(result, costs) for result in made)
        yield held
        held -= sum(_freed(result, costs) for result in made)


def _allocated(result: Result, costs: Costs) -> float:
    return costs.activation_bytes[result.stage] if isinstance(result, Forward) else 0.0


def _freed(result: Result, costs: Costs) -> float:
    match result:
        case Forward():
            return 0.0
        case InputGrad(stage):
            return costs.activation_bytes[stage] - costs.weight_grad_bytes[stage]
        case WeightGrad(stage):
            return costs.weight_grad_bytes[stage]
        case _:
            assert_never(result)
