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

import heapq
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import ComputeOp, Op, ReduceGrads, Unshard, WeightGrad, parts
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Timeline
from evenflow.rules import Result, carriers, dependencies, results
from evenflow.simulate import simulate


def lower(
    schedule: Schedule,
    flow: Flow,
    costs: Costs | None = None,
    *,
    reduce_grads: bool = False,
    unshard: bool = False,
) -> Program:
    """Return `schedule` as a program, with a transfer wherever `flow` lets a value leave its stage.

    `costs` decide where transfers stand (by default all stages are alike); give the ones that the machine is
    thought to have. With `reduce_grads`, each stage's gradients are summed over the replicas of data
    parallelism as soon as the last is there; with `unshard`, its parameters are gathered from them before its
    first op. Raises `ScheduleError` for a schedule that can't be executed, as
    `simulate` does, and `ConfigError` for costs of another number of stages. Each rank's compute ops keep
    their order.

    >>> from evenflow.schedules.one_f_one_b import one_f_one_b
    >>> program = lower(one_f_one_b(num_ranks=2, stages_per_rank=1, num_microbatches=2), Flow.chain(2))
    >>> print(*program.ranks[0])
    0F0 S0>1F0 0F1 S0>1F1 R1>0B0 0B0 R1>0B1 0B1
    >>> print(*program.ranks[1])
    R0>1F0 1F0 R0>1F1 1B0 S1>0B0 1F1 1B1 S1>0B1
    """
    timeline = simulate(schedule, flow, costs or Costs.uniform(schedule.placement.num_stages))
    merge = _Merge(schedule, flow, timeline)
    merge.run()
    queues = [_with_reductions(queue) for queue in merge.queues] if reduce_grads else merge.queues
    queues = [_with_gathering(queue) for queue in queues] if unshard else queues
    return Program(schedule, flow, tuple(tuple(queue) for queue in queues))


@dataclass(frozen=True, slots=True)
class _Compute:
    """A rank runs the next op of its queue."""

    rank: int


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A result goes to another stage: one handoff on one rank, or a send and its receive on two."""

    result: Result
    target: int


_Event: TypeAlias = _Compute | _Transfer


class _Merge:
    """Puts all events into one order, earliest first, and each into the queues of its ranks."""

    def __init__(self, schedule: Schedule, flow: Flow, timeline: Timeline) -> None:
        self.placement, self.flow = schedule.placement, flow
        self.computes, self.lanes = schedule.ranks, timeline.lanes
        self.queues: list[list[Op]] = [[] for _ in self.computes]
        self.heads = [0] * len(self.computes)  # the next compute op of each rank
        self.queued = [False] * len(self.computes)  # whether that op is among the events
        self.there: set[tuple[Result, int]] = set()  # which result has come to which stage
        self.consumers = _consumers(flow, timeline)
        # Its moment, and how many came before it: equal moments keep their order.
        self.events: list[tuple[float, int, _Event]] = []
        self.num_pushed = 0

    def run(self) -> None:
        """Let every event happen."""
        for rank in range(len(self.computes)):
            self.push_head(rank)
        while self.events:
            moment, _, event = heapq.heappop(self.events)
            match event:
                case _Compute(rank):
                    self.compute(rank)
                case _Transfer(result, target):
                    self.transfer(moment, result, target)
                case _:
                    assert_never(event)

    def compute(self, rank: int) -> None:
        """Let a rank run its next op, and let what that makes leave for the stages that wait for it."""
        at = self.heads[rank]
        op = self.computes[rank][at]
        self.queues[rank].append(op)
        for result in results(op):
            self.there.add((result, result.stage))
            for _, target in self.consumers.get(result, ()):
                self.push(self.lanes[rank].end_seconds[at], _Transfer(result, target))
        self.heads[rank] += 1
        self.queued[rank] = False
        self.push_head(rank)

    def transfer(self, moment: float, result: Result, target: int) -> None:
        """Let a result arrive in a stage."""
        source_rank = self.placement.rank_of[result.stage]
        target_rank = self.placement.rank_of[target]
        match carriers(result, target, self.placement):
            case ():
                raise AssertionError(f"{result} needs no transfer to stage {target}")
            case (handoff,):
                self.queues[source_rank].append(handoff)
            case (send, recv):
                self.queues[source_rank].append(send)
                self.queues[target_rank].append(recv)
            case never:
                assert_never(never)
        self.there.add((result, target))
        self.push_head(target_rank)

    def push_head(self, rank: int) -> None:
        """Make a rank's next op an event if nothing that it waits for is missing."""
        at = self.heads[rank]
        if self.queued[rank] or at == len(self.computes[rank]):
            return
        op = self.computes[rank][at]
        if all(
            (result, part.stage) in self.there
            for part in parts(op)
            for result in dependencies(part, self.flow)
        ):
            self.queued[rank] = True
            self.push(self.lanes[rank].start_seconds[at], _Compute(rank))

    def push(self, moment: float, event: _Event) -> None:
        """Put an event among those that can happen."""
        heapq.heappush(self.events, (moment, self.num_pushed, event))
        self.num_pushed += 1


def _consumers(flow: Flow, timeline: Timeline) -> dict[Result, list[tuple[float, int]]]:
    """The other stages that wait for each result, with the moment when each uses it, earliest first."""
    consumers: dict[Result, list[tuple[float, int]]] = {}
    for lane in timeline.lanes:
        for op, start in zip(lane.ops, lane.start_seconds, strict=True):
            assert isinstance(op, ComputeOp), f"{op} in a simulated timeline"
            for part in parts(op):
                for result in dependencies(part, flow):
                    if result.stage != part.stage:
                        consumers.setdefault(result, []).append((start, part.stage))
    for waiting in consumers.values():
        waiting.sort()
    return consumers


def _with_gathering(queue: list[Op]) -> list[Op]:
    """The queue with a gathering of each stage's parameters before the first op that computes in it."""
    there: set[int] = set()
    made: list[Op] = []
    for op in queue:
        if isinstance(op, ComputeOp):
            new = dict.fromkeys(part.stage for part in parts(op) if part.stage not in there)
            made += map(Unshard, new)
            there.update(new)
        made.append(op)
    return made


def _with_reductions(queue: list[Op]) -> list[Op]:
    """The queue with a reduction of each stage's gradients behind the op that makes the last of them."""
    last: dict[int, int] = {}
    for at, op in enumerate(queue):
        if isinstance(op, ComputeOp):
            last.update((result.stage, at) for result in results(op) if isinstance(result, WeightGrad))
    behind: dict[int, list[int]] = {}
    for stage, at in last.items():
        behind.setdefault(at, []).append(stage)
    return [
        each
        for at, op in enumerate(queue)
        for each in (op, *(ReduceGrads(stage) for stage in behind.get(at, ())))
    ]
