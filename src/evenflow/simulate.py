"""Simulate: when each op would run, if every op took what the costs say.

The simulator and the tracer return the same `Timeline`, so that prediction and fact can be laid over each
other. Its machine computes and transfers at the same time, and has any number of buffers: what it finds is
the time that a good link reaches. Whether a program also lives on the worst link is `validate`'s question.
"""

from collections.abc import Mapping

from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import ComputeOp
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Span, Timeline
from evenflow.rules import dependencies
from evenflow.soundness import refusal, schedule_faults


def simulate(schedule: Schedule, flow: Flow, costs: Costs) -> Timeline:
    """Return the timeline of one step, in seconds from its start.

    A rank runs its ops in their order; each starts as soon as the rank is free and everything that it depends
    on has arrived, `costs.transfer_seconds` later if it comes from another rank. The spans are in order of
    their starts, and where starts are equal still in an order that meets every dependency. The time taken
    is linear in the number of dependencies, apart from one sort.

    Raises `ScheduleError` for a schedule that is incomplete or comes to a standstill, naming the op before
    which each rank stands, and `ConfigError` for costs of another number of stages.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=4)
    >>> timeline = simulate(schedule, Flow.chain(2), Costs.uniform(2))
    >>> timeline.makespan_seconds, round(timeline.bubble, 3)  # (p - 1) / (m + p - 1) = 1 / 5
    (15.0, 0.2)
    """
    if costs.num_stages != schedule.placement.num_stages:
        raise ConfigError(
            f"costs name {costs.num_stages} stages, schedule {schedule.name!r} has "
            f"{schedule.placement.num_stages}: price each stage"
        )
    queues = schedule.ranks
    if faults := schedule_faults(schedule, flow, queues):
        raise refusal(schedule.name, faults, queues, [0] * len(queues))
    spans = _run(schedule, flow, costs)
    if len(spans) < sum(len(queue) for queue in queues):
        raise _standstill(schedule, flow, spans)
    # A stable sort: an op of no length starts together with those that wait for it, and stays before them.
    ordered = sorted(spans.values(), key=lambda span: span.start_seconds)
    return Timeline(schedule.placement.num_ranks, tuple(ordered))


def _run(schedule: Schedule, flow: Flow, costs: Costs) -> dict[ComputeOp, Span]:
    """Run every op that can be reached; the spans come in an order that meets every dependency."""
    spans: dict[ComputeOp, Span] = {}
    heads = [0] * len(schedule.ranks)
    free_seconds = [0.0] * len(schedule.ranks)
    waiting: dict[ComputeOp, list[int]] = {}
    # A start depends on the ends before it alone, so the order in which ranks are visited does not matter.
    ready = list(range(len(schedule.ranks)))
    while ready:
        rank = ready.pop()
        queue = schedule.ranks[rank]
        while heads[rank] < len(queue):
            op = queue[heads[rank]]
            needed = dependencies(op, flow)
            missing = next((dependency for dependency in needed if dependency not in spans), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            arrivals = (_arrival_seconds(spans[dependency], rank, costs) for dependency in needed)
            start = max(free_seconds[rank], *arrivals) if needed else free_seconds[rank]
            free_seconds[rank] = start + costs.seconds(op)
            spans[op] = Span(rank, op, start, free_seconds[rank])
            heads[rank] += 1
            ready += waiting.pop(op, ())
    return spans


def _arrival_seconds(source: Span, rank: int, costs: Costs) -> float:
    return source.end_seconds + (0.0 if source.rank == rank else costs.transfer_seconds)


def _standstill(schedule: Schedule, flow: Flow, ended: Mapping[ComputeOp, Span]) -> ScheduleError:
    faults, starts = [], []
    for rank, queue in enumerate(schedule.ranks):
        head = next((position for position, op in enumerate(queue) if op not in ended), len(queue))
        starts.append(max(0, head - 3))
        if head < len(queue):
            missing = next(needed for needed in dependencies(queue[head], flow) if needed not in ended)
            owner = schedule.placement.rank_of[missing.stage]
            faults.append(
                f"standstill: rank {rank} stands before {queue[head]}, "
                f"which waits for {missing} on rank {owner}"
            )
    return refusal(schedule.name, faults, schedule.ranks, starts)
