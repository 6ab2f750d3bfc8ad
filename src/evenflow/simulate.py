"""Simulate: when each op would run, if every op took what the costs say.

The simulator and the tracer return the same `Timeline`, so that prediction and fact can be laid over each
other. Its machine computes and transfers at the same time, and has any number of buffers; each direction
between two ranks is a link that carries one transfer at a time, in the order in which values are made. What
it finds is the time that a good link reaches. Whether a program also lives on the worst link is `validate`'s
question.

A schedule of 64 ranks, 4 stages each and 512 microbatches holds 400,000 ops, and is to be priced in a second:
so inside, a result is a row (kind and stage) and a microbatch, and what an op waits for are numbers in lists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from evenflow.errors import ScheduleError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, Forward, InputGrad, Overlap, SimpleOp, WeightGrad, parts
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Lane, Timeline
from evenflow.rules import dependencies, results
from evenflow.soundness import check_costs, refusal, schedule_faults

_NOT_YET = -1.0


def simulate(schedule: Schedule, flow: Flow, costs: Costs) -> Timeline:
    """Return the timeline of one step, in seconds from its start; of compute ops alone.

    A rank runs its ops in their order; each starts as soon as the rank is free and everything that it depends
    on has arrived. What comes from another rank waits until the link between the two is free, occupies it for
    its bytes, and arrives one latency later. The time taken is linear in the number of dependencies.

    Raises `ScheduleError` for a schedule that is incomplete or comes to a standstill, naming the op before
    which each rank stands, and `ConfigError` for costs of another number of stages or ranks. What ranks hold
    is not looked at: `evenflow.memory` does that.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=4)
    >>> timeline = simulate(schedule, Flow.chain(2), Costs.uniform(2))
    >>> timeline.makespan_seconds, round(timeline.bubble, 3)  # (p - 1) / (m + p - 1) = 1 / 5
    (15.0, 0.2)
    """
    check_costs(schedule.placement, costs)
    queues = schedule.ranks
    if faults := schedule_faults(schedule, flow, queues):
        raise refusal(schedule.name, faults, queues, [0] * len(queues))
    machine = _Machine(schedule, flow, costs)
    machine.run()
    lanes = tuple(map(Lane, queues, machine.starts, machine.ends))
    if any(len(lane.end_seconds) < len(queue) for lane, queue in zip(lanes, queues, strict=True)):
        raise _standstill(schedule, flow, [len(ends) for ends in machine.ends])
    return Timeline(lanes)


@dataclass(frozen=True, slots=True)
class _Channel:
    """How one kind of result reaches one stage that waits for it. `arrived` is filled in as time goes on."""

    arrived: list[float]  # by microbatch: when it is there; `_NOT_YET` before
    target: int  # rank
    occupied_seconds: float
    latency_seconds: float
    link: list[float]  # of one number: when the link is free, shared by all channels over it


@dataclass(frozen=True, slots=True)
class _Row:
    """What all ops of one kind and stage have in common."""

    seconds: float
    needs: tuple[list[float], ...]  # the `arrived` of each channel that must have delivered
    gives: tuple[_Channel, ...]


_Part: TypeAlias = tuple[_Row, int]  # with the microbatch


class _Machine:
    def __init__(self, schedule: Schedule, flow: Flow, costs: Costs) -> None:
        self.queues = schedule.ranks
        self.rows = _rows(schedule.placement, flow, costs, schedule.num_microbatches)
        self.overlap_share = costs.overlap_share
        self.starts: list[list[float]] = [[] for _ in self.queues]
        self.ends: list[list[float]] = [[] for _ in self.queues]

    def run(self) -> None:
        """Run every op that can be reached."""
        # What each rank stands and waits for: a channel's list and a place in it.
        blocked: list[tuple[list[float], int] | None] = [None] * len(self.queues)
        # A start depends on the ends before it alone: ranks may be visited in any order.
        ready = list(range(len(self.queues)))
        while ready:
            rank = ready.pop()
            blocked[rank] = self._run_rank(rank, blocked, ready)

    def _run_rank(
        self, rank: int, blocked: list[tuple[list[float], int] | None], ready: list[int]
    ) -> tuple[list[float], int] | None:
        """Run one rank until it must wait, and wake those that wait for it; return what it waits for."""
        starts, ends = self.starts[rank], self.ends[rank]
        free = ends[-1] if ends else 0.0
        queue = self.queues[rank]
        for at in range(len(ends), len(queue)):
            op = queue[at]
            start = free
            # Nearly all ops are simple; a call for each would take a quarter of the time.
            if isinstance(op, Overlap):
                pieces = tuple((self.rows[type(part)][part.stage], part.microbatch) for part in parts(op))
                seconds = self.overlap_share * sum(row.seconds for row, _ in pieces)
            else:
                row = self.rows[type(op)][op.stage]
                pieces, seconds = ((row, op.microbatch),), row.seconds
            for row, microbatch in pieces:
                for arrived in row.needs:
                    arrival = arrived[microbatch]
                    if arrival > start:
                        start = arrival
                    elif arrival == _NOT_YET:
                        return arrived, microbatch
            free = start + seconds
            starts.append(start)
            ends.append(free)
            for row, microbatch in pieces:
                for channel in row.gives:
                    arrived = channel.arrived
                    if channel.target == rank:
                        arrived[microbatch] = free
                        continue
                    link = channel.link
                    left = max(link[0], free) + channel.occupied_seconds
                    link[0] = left
                    arrived[microbatch] = left + channel.latency_seconds
                    waits = blocked[channel.target]
                    if waits is not None and waits[0] is arrived and waits[1] == microbatch:
                        blocked[channel.target] = None
                        ready.append(channel.target)
        return None


def _rows(
    placement: Placement, flow: Flow, costs: Costs, num_microbatches: int
) -> dict[type[SimpleOp], list[_Row]]:
    """The row of each kind and stage, from what `rules` says of microbatch 0."""
    kinds: tuple[type[SimpleOp], ...] = (Forward, Backward, InputGrad, WeightGrad)
    stages = range(placement.num_stages)
    gives: dict[object, list[_Channel]] = {}  # by result
    needs: dict[SimpleOp, list[list[float]]] = {kind(stage, 0): [] for kind in kinds for stage in stages}
    links: dict[tuple[int, int], list[float]] = {}
    channels: dict[tuple[object, int, object], _Channel] = {}
    for op, wanted in needs.items():
        rank = placement.rank_of[op.stage]
        for result in dependencies(op, flow):
            source = placement.rank_of[result.stage]
            # A whole backward and an input gradient wait for the same transfer.
            key = (result, op.stage, results(op)[0])
            if key not in channels:
                link = costs.link_between(source, rank)
                channels[key] = _Channel(
                    [_NOT_YET] * num_microbatches,
                    rank,
                    link.occupied_seconds(costs.sent_bytes.get((result.stage, op.stage), 0.0)),
                    link.latency_seconds,
                    links.setdefault((source, rank), [0.0]),
                )
                gives.setdefault(result, []).append(channels[key])
            wanted.append(channels[key].arrived)
    return {
        kind: [
            _Row(
                costs.seconds(kind(stage, 0)),
                tuple(needs[kind(stage, 0)]),
                tuple(channel for made in results(kind(stage, 0)) for channel in gives.get(made, ())),
            )
            for stage in stages
        ]
        for kind in kinds
    }


def _standstill(schedule: Schedule, flow: Flow, heads: Sequence[int]) -> ScheduleError:
    """Why nothing goes on: the op at which each rank stands (its place in `heads`), and what it waits for."""
    made = {
        result
        for queue, head in zip(schedule.ranks, heads, strict=True)
        for op in queue[:head]
        for result in results(op)
    }
    faults = []
    for rank, (queue, head) in enumerate(zip(schedule.ranks, heads, strict=True)):
        if head < len(queue):
            missing = next(needed for needed in dependencies(queue[head], flow) if needed not in made)
            owner = schedule.placement.rank_of[missing.stage]
            faults.append(
                f"standstill: rank {rank} stands before {queue[head]}, "
                f"which waits for {missing} on rank {owner}"
            )
    return refusal(schedule.name, faults, schedule.ranks, [max(0, head - 3) for head in heads])
