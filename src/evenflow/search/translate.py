"""Translate: schedules and costs into the search's letters and arrays, and orders of letters back."""

from collections import defaultdict

import numpy as np

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, WeightGrad, parts
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.search.problem import Edge, Order, Problem


def problem_of(placement: Placement, num_microbatches: int, flow: Flow, costs: Costs) -> Problem:
    """Return the problem of finding an order for these stages and costs.

    A transfer's delay is its latency and the time that it occupies its link; that two transfers may meet on
    one link is left to the simulator. Raises `ScheduleError` where a rank cannot hold one microbatch.

    >>> problem_of(Placement.v_shape(2), 4, Flow.chain(4), Costs.uniform(4)).rank_of.tolist()
    [0, 1, 1, 0]
    """

    def delayed(edges: frozenset[tuple[int, int]]) -> tuple[Edge, ...]:
        return tuple((*edge, costs.delay_seconds(*edge, placement)) for edge in sorted(edges))

    caps = costs.memory_caps or (np.inf,) * placement.num_ranks
    return Problem(
        num_microbatches=num_microbatches,
        rank_of=np.array(placement.rank_of, np.int64),
        forward_seconds=np.array(costs.forward_seconds, np.float64),
        input_seconds=np.array(costs.input_grad_seconds, np.float64),
        weight_seconds=np.array(costs.weight_grad_seconds, np.float64),
        activations=delayed(flow.activations),
        gradients=delayed(flow.gradients),
        stored_bytes=np.array(costs.activation_bytes, np.float64),
        kept_bytes=np.array(costs.weight_grad_bytes, np.float64),
        cap_bytes=np.array(caps, np.float64),
    )


def order_of(schedule: Schedule) -> Order:
    """Return the letters of a schedule; a whole backward is two, and an overlap its ops in turn.

    >>> from evenflow.ir.placement import Placement
    >>> queue = (Forward(0, 0), Backward(0, 0))
    >>> order_of(Schedule("tiny", Placement.linear(1), num_microbatches=1, ranks=(queue,)))
    ((0, 1, 2),)
    """
    num = schedule.placement.num_stages

    def letters(op: ComputeOp) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        for part in parts(op):
            match part:
                case Forward(stage):
                    found += (stage,)
                case InputGrad(stage):
                    found += (num + stage,)
                case WeightGrad(stage):
                    found += (2 * num + stage,)
                case Backward(stage):
                    found += (num + stage, 2 * num + stage)
        return found

    return tuple(tuple(letter for op in queue for letter in letters(op)) for queue in schedule.ranks)


def schedule_of(order: Order, placement: Placement, num_microbatches: int, name: str) -> Schedule:
    """Return the schedule of strict letters: the n-th of a letter is its op of microbatch n.

    >>> from evenflow.ir.placement import Placement
    >>> print(*schedule_of(((0, 1, 2),), Placement.linear(1), 1, "tiny").ranks[0])
    0F0 0I0 0W0
    """
    num = placement.num_stages
    kinds = (Forward, InputGrad, WeightGrad)
    queues = []
    for letters in order:
        seen: defaultdict[int, int] = defaultdict(int)
        queue = []
        for letter in letters:
            queue.append(kinds[letter // num](letter % num, seen[letter]))
            seen[letter] += 1
        queues.append(tuple(queue))
    return Schedule(name, placement, num_microbatches, tuple(queues))
