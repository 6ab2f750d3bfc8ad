"""Gap filling: what the schedules share that let weight gradients run wherever their rank would idle.

A method says which forward or input gradient a rank runs next, and here a clock runs the ranks against each
other to see where gaps are. It counts in ticks, with equal ops and transfers, because a schedule is a
function of sizes alone; other costs then run in the same order. Nobody waits for a weight gradient, so it
fills a gap: always one that is long enough, and a shorter one where idling would make this rank the one that
idles most. A rank that idles less than another may as well wait, and delay nobody. Idle ticks count from a
rank's own first op, as in the span.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 3.1.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.ir.placement import Placement

Kind: TypeAlias = type[Forward] | type[InputGrad] | type[WeightGrad]


class Turn(NamedTuple):
    """What a rank runs next: the kind, the stage, and the tick at which what it waits for is there."""

    kind: Kind
    stage: int
    arrival: int


class Pace(NamedTuple):
    """How the clock runs: ticks of an op, and of a transfer."""

    op_ticks: int
    transfer_ticks: int


class Progress:
    """What has run so far. Each stage runs each kind in the order of the microbatches."""

    def __init__(self, placement: Placement, num_microbatches: int, pace: Pace) -> None:
        self.num_microbatches = num_microbatches
        self.op_ticks = pace.op_ticks
        self.forward_ends: list[list[int]] = [[] for _ in placement.rank_of]
        self.input_grad_ends: list[list[int]] = [[] for _ in placement.rank_of]
        self.num_weight_grads = [0] * placement.num_stages
        # By rank: the stages of the input gradients whose weight gradients have not run, oldest first.
        self.pending: tuple[deque[int], ...] = tuple(deque() for _ in range(placement.num_ranks))
        self._hop_ticks = [
            0 if one == other else pace.transfer_ticks for one, other in pairwise(placement.rank_of)
        ]

    def held(self, stage: int) -> int:
        """Return how many microbatches' activations a stage holds."""
        return len(self.forward_ends[stage]) - self.num_weight_grads[stage]

    def arrival(self, kind: Kind, stage: int) -> int | None:
        """Return when a stage's next op of a kind can start; None while nobody knows, or if all ran."""
        if kind is Forward:
            at = len(self.forward_ends[stage])
            if at >= self.num_microbatches:
                return None
            if stage == 0:
                return 0
            before = self.forward_ends[stage - 1]
            return before[at] + self._hop_ticks[stage - 1] if at < len(before) else None
        at = len(self.input_grad_ends[stage])
        own = self.forward_ends[stage]
        if at == len(own):
            return None
        if stage == len(self.forward_ends) - 1:
            return own[at]
        after = self.input_grad_ends[stage + 1]
        return max(own[at], after[at] + self._hop_ticks[stage]) if at < len(after) else None

    def run(self, turn: Turn, rank: int, start: int) -> ComputeOp:
        """Run the op and return it."""
        stage = turn.stage
        if turn.kind is WeightGrad:
            self.pending[rank].remove(stage)
            self.num_weight_grads[stage] += 1
            return WeightGrad(stage, self.num_weight_grads[stage] - 1)
        if turn.kind is InputGrad:
            self.pending[rank].append(stage)
        ends = self.forward_ends[stage] if turn.kind is Forward else self.input_grad_ends[stage]
        ends.append(start + self.op_ticks)
        return turn.kind(stage, len(ends) - 1)


Choose: TypeAlias = Callable[[Progress, int, int], Turn | None]


def fill(
    placement: Placement, num_microbatches: int, choose: Choose, pace: Pace
) -> tuple[tuple[ComputeOp, ...], ...]:
    """Return the queues that come about when each free rank runs the op of `choose(progress, rank, now)`.

    None stands for nothing that is known to come.
    """
    return _Clock(placement, num_microbatches, choose, pace).queues()


@dataclass(slots=True)
class _Rank:
    queue: list[ComputeOp]
    free: int = 0
    idle: int = 0


class _Clock:
    def __init__(self, placement: Placement, num_microbatches: int, choose: Choose, pace: Pace) -> None:
        self.placement, self.choose, self.pace = placement, choose, pace
        self.progress = Progress(placement, num_microbatches, pace)
        self.ranks = [_Rank([]) for _ in range(placement.num_ranks)]
        # When some rank may have something to do; each rank stands here more than once.
        self.alarms = [(0, rank) for rank in range(placement.num_ranks)]

    def queues(self) -> tuple[tuple[ComputeOp, ...], ...]:
        while self.alarms:
            now, rank = heapq.heappop(self.alarms)
            if now >= self.ranks[rank].free:
                self.step(rank, now)
        assert min(self.progress.num_weight_grads) >= self.progress.num_microbatches, "a standstill"
        return tuple(tuple(rank.queue) for rank in self.ranks)

    def step(self, rank: int, now: int) -> None:
        """Let a free rank run one op, or wait."""
        turn = self.choose(self.progress, rank, now)
        pending = self.progress.pending[rank]
        gap = None if turn is None else turn.arrival - now
        if pending and (gap is None or gap > 0) and self.fills(rank, gap):
            turn, gap = Turn(WeightGrad, pending[0], now), 0
        if turn is None or gap is None:
            return  # whoever runs what this rank waits for sets an alarm
        if gap >= self.pace.op_ticks:
            # Something better may come before.
            heapq.heappush(self.alarms, (turn.arrival, rank))
            return
        self.run(turn, rank, now + max(gap, 0))

    def fills(self, rank: int, gap: int | None) -> bool:
        """Whether a weight gradient goes before what arrives after the gap."""
        if gap is None or gap >= self.pace.op_ticks:
            return True
        return self.ranks[rank].idle + gap > max(one.idle for one in self.ranks)

    def run(self, turn: Turn, rank: int, start: int) -> None:
        lane = self.ranks[rank]
        if lane.queue:
            lane.idle += start - lane.free
        lane.queue.append(self.progress.run(turn, rank, start))
        lane.free = start + self.pace.op_ticks
        heapq.heappush(self.alarms, (lane.free, rank))
        if turn.kind is WeightGrad:
            return
        waiting = turn.stage + (1 if turn.kind is Forward else -1)
        if 0 <= waiting < self.placement.num_stages:
            other = self.placement.rank_of[waiting]
            arrival = lane.free + self.pace.transfer_ticks
            heapq.heappush(self.alarms, (max(self.ranks[other].free, arrival), other))
