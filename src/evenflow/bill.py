"""The bubble bill: where each rank's step went, idle time by its cause, to the last microsecond.

A rank computes, or it waits, or it does something else. It waits for values of other ranks: until their
producer has ended that is the schedule's doing, or that of stages that take longer than others; from then on
it is the transfer's. All else is the host's: starting ops, agreeing on a batch, the optimizer's step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from evenflow.ir.flow import Flow
from evenflow.ir.op import ComputeOp, Op
from evenflow.ir.timeline import Timeline
from evenflow.rules import Result, dependencies, results


@dataclass(frozen=True, slots=True)
class Ran:
    """What one rank did in a step: its ops with the seconds at which each began to wait, started and ended.

    `start_seconds` and `end_seconds` are the step's own on that rank; `update_seconds` of them went to
    putting gradients together and to the optimizer.

    >>> from evenflow.ir.op import Forward
    >>> Ran([(Forward(0, 0), 0.0, 0.5, 1.5)], start_seconds=0.0, end_seconds=2.0).update_seconds
    0.0
    """

    ops: Sequence[tuple[Op, float, float, float]]
    start_seconds: float
    end_seconds: float
    update_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Bill:
    """Seconds of a step on one rank, which add up to the step's.

    - `compute`: forwards and backwards.
    - `schedule`: waiting that the schedule asks for even of equal stages: filling, draining, dependencies.
    - `imbalance`: waiting beyond that for values that were not made yet: stages take longer than others.
    - `transfer`: sending, and waiting for values that were made.
    - `host`: all else that this process did, and `update`: gradients put together, the optimizer's step.

    >>> bill = Bill(compute=6.0, schedule=2.0, imbalance=1.0, transfer=0.5, host=0.25, update=0.25)
    >>> bill.step, bill.idle
    (10.0, 4.0)
    """

    compute: float
    schedule: float
    imbalance: float
    transfer: float
    host: float
    update: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return math.fsum(getattr(self, each.name) for each in fields(self))

    @property
    def idle(self) -> float:
        """Seconds in which nothing was computed."""
        return self.step - self.compute


def bills(ranks: Sequence[Ran], flow: Flow, balanced: Timeline) -> tuple[Bill, ...]:
    """Return each rank's bill of one step, from when the last rank has begun it until the last has ended it.

    Times of all ranks must be of one clock. `balanced` is the schedule's timeline where all stages take
    equally long and transfers nothing: a rank that waits as long as it does there waits for the schedule.

    >>> from evenflow.ir.op import Backward, Forward
    >>> from evenflow.ir.timeline import Span
    >>> first = Ran([(Forward(0, 0), 0.0, 0.0, 1.0), (Backward(0, 0), 1.0, 5.5, 7.0)], 0.0, 7.0)
    >>> second = Ran([(Forward(1, 0), 0.0, 1.5, 3.0), (Backward(1, 0), 3.0, 3.0, 5.0)], 0.0, 7.0)
    >>> spans = [Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 2.0)]
    >>> spans += [Span(1, Backward(1, 0), 2.0, 4.0), Span(0, Backward(0, 0), 4.0, 6.0)]
    >>> one, other = bills([first, second], Flow.chain(2), Timeline.of(2, spans))
    >>> one.schedule, one.imbalance, one.transfer, one.step
    (3.0, 1.0, 0.5, 7.0)
    """
    # Who begins a step early waits for the others before any op, at the end of what is their last step.
    start, end = (
        max(edges) for edges in zip(*((ran.start_seconds, ran.end_seconds) for ran in ranks), strict=True)
    )
    made: dict[Result, float] = {}
    for ran in ranks:
        for op, _, _, ended in ran.ops:
            if isinstance(op, ComputeOp):
                made.update(dict.fromkeys(results(op), ended))
    return tuple(
        _bill(ran, flow, made, (start, end), balanced.idle_seconds(rank)) for rank, ran in enumerate(ranks)
    )


def _bill(
    ran: Ran, flow: Flow, made: Mapping[Result, float], window: tuple[float, float], implied: float
) -> Bill:
    compute = transfer = 0.0
    waited = window[1] - ran.end_seconds
    for op, began, started, ended in ran.ops:
        if isinstance(op, ComputeOp):
            ready = max((made[each] for each in dependencies(op, flow)), default=began)
            compute += ended - started
            waited += min(max(ready, began), started) - began
            transfer += started - min(max(ready, began), started)
        else:
            transfer += ended - began
    schedule = min(waited, implied)
    host = (window[1] - window[0]) - compute - waited - transfer - ran.update_seconds
    return Bill(compute, schedule, waited - schedule, transfer, host, ran.update_seconds)


def of_timeline(timeline: Timeline) -> list[Ran]:
    """What ranks do in a predicted timeline, in which nothing but computing and waiting takes time."""
    ranks = []
    for lane in timeline.lanes:
        began = [0.0, *lane.end_seconds[:-1]]
        rows = zip(lane.ops, began, lane.start_seconds, lane.end_seconds, strict=True)
        ranks.append(Ran(list(rows), 0.0, lane.end_seconds[-1] if lane.ops else 0.0))
    return ranks
