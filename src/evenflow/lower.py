"""Lower: write the transfers into a schedule, so that it cannot deadlock.

Why it cannot: all events, computes and transfers of all ranks, are put into *one* order in which every event
comes after those that it waits for, and each rank's queue is that order with the other ranks' events left
out. A send and its receive are one event. Take any moment of the run, and the first event of the order that
has not happened. Everything before it has happened, so it is at the head of the queue of each rank that takes
part, and all that it waits for is there: it can happen, even with one serial queue a rank, no buffer at all,
and matching by order. So the run never stands still. And both ends of a pair of ranks see their transfers in
the same order, so that nothing is mistaken for something else.

The argument holds for any such order. The simulated times choose a good one: an event's place is the
moment when it could begin, which is its start for a compute and the end of the producer for a transfer. A
send thus follows its producer at once. A receive stands behind the computes that its rank has begun by then,
and in front of those that begin later: the rank never waits in it for a producer that has not ended. It may
wait there for the link; but a place later by the link's latency would hold back the send too, as both are
one event. Costs that are wrong make the order worse, and never unsafe.
"""

from dataclasses import dataclass
from typing import assert_never

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, Op
from evenflow.ir.placement import Placement
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Timeline
from evenflow.rules import carriers, dependencies
from evenflow.simulate import simulate


def lower(schedule: Schedule, flow: Flow, costs: Costs | None = None) -> Program:
    """Return `schedule` as a program, with a transfer wherever `flow` lets a value leave its stage.

    `costs` decide where transfers stand (by default all stages are alike); give the ones that the machine is
    thought to have. Raises `ScheduleError` for a schedule that can't be executed, as `simulate` does, and
    `ConfigError` for costs of another number of stages. Each rank's compute ops keep their order.

    >>> from evenflow.schedules.one_f_one_b import one_f_one_b
    >>> program = lower(one_f_one_b(num_ranks=2, stages_per_rank=1, num_microbatches=2), Flow.chain(2))
    >>> print(*program.ranks[0])
    0F0 S0>1F0 0F1 S0>1F1 R1>0B0 0B0 R1>0B1 0B1
    >>> print(*program.ranks[1])
    R0>1F0 1F0 R0>1F1 1B0 S1>0B0 1F1 1B1 S1>0B1
    """
    timeline = simulate(schedule, flow, costs or Costs.uniform(schedule.placement.num_stages))
    queues: list[list[Op]] = [[] for _ in schedule.ranks]
    for event in _ordered_events(schedule, flow, timeline):
        for rank, op in event.steps:
            queues[rank].append(op)
    return Program(schedule, flow, tuple(tuple(queue) for queue in queues))


@dataclass(frozen=True, slots=True)
class _Event:
    """What happens at once: one op on one rank, or a send and its receive on two."""

    begin_seconds: float
    steps: tuple[tuple[int, Op], ...]


def _ordered_events(schedule: Schedule, flow: Flow, timeline: Timeline) -> list[_Event]:
    consumers: dict[ComputeOp, list[ComputeOp]] = {}
    # The timeline is in order of starts: of several consumers, the one that starts first is served first.
    for consumer in _compute_ops(timeline):
        for producer in dependencies(consumer, flow):
            consumers.setdefault(producer, []).append(consumer)
    events: list[_Event] = []
    for span, producer in zip(timeline.spans, _compute_ops(timeline), strict=True):
        events.append(_Event(span.start_seconds, ((span.rank, producer),)))
        for consumer in consumers.get(producer, ()):
            steps = _transfer_steps(producer, consumer, schedule.placement)
            if steps:
                events.append(_Event(span.end_seconds, steps))
    # Before the sort, each event stands after those that it waits for; it begins no earlier than they do;
    # and the sort is stable: so each still does.
    return sorted(events, key=lambda event: event.begin_seconds)


def _compute_ops(timeline: Timeline) -> list[ComputeOp]:
    return [span.op for span in timeline.spans if isinstance(span.op, Forward | Backward)]


def _transfer_steps(
    producer: ComputeOp, consumer: ComputeOp, placement: Placement
) -> tuple[tuple[int, Op], ...]:
    source, target = placement.rank_of[producer.stage], placement.rank_of[consumer.stage]
    match carriers(producer, consumer, placement):
        case ():
            return ()
        case (handoff,):
            return ((source, handoff),)
        case (send, recv):
            return ((source, send), (target, recv))
        case never:
            assert_never(never)
