"""ZB-auto: a split 1F1B that is fitted to measured costs and to each rank's memory.

Source: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 3.1,
"The heuristic algorithm". A planner lays one op after another on each rank and keeps the time. It warms up
with as many forwards as memory and the first input gradient leave room for; then it takes a forward and an
input gradient in turn; weight gradients fill the gaps, and give memory back where a forward needs it. Two
choices are open: whether a last forward of the warm-up may delay the first input gradient, and whether a rank
that is ahead may leave a forward out in favour of a gradient. All four combinations are tried, beside them
the handcrafted schedules that fit the memory; the shortest span wins, as `simulate` finds it.

For equal ranks, a cap of p microbatches gives ZB-H1's bubble, and one of 2 p nearly none: the paper's columns
ZB-1p and ZB-2p. The paper leaves open how a choice on one rank reaches the others; here what delays the first
input gradient of a rank delays those of the earlier ranks, and they have time for more forwards.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import inf

from evenflow.errors import ConfigError
from evenflow.ir.costs import ROUNDING, Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.memory import memory_faults
from evenflow.schedules.sizes import one_stage_a_rank
from evenflow.schedules.zb_h1 import zb_h1
from evenflow.schedules.zb_h2 import zb_h2
from evenflow.schedules.zero_bubble import split_queue
from evenflow.simulate import simulate
from evenflow.soundness import check_costs


def zb_auto(
    num_ranks: int, stages_per_rank: int, num_microbatches: int, costs: Costs | None = None
) -> Schedule:
    """Return the automatic zero-bubble schedule, one stage a rank, for these costs and their `memory_caps`.

    Without costs all ops take equally long, transfers nothing, and each rank can hold `num_ranks`
    microbatches. Raises `ConfigError` for a count below 1, for `stages_per_rank > 1`, for costs or caps of
    other counts, and for a cap that can't hold one microbatch.

    >>> from evenflow.view.text import draw_schedule
    >>> costs = replace(Costs.uniform(3), memory_caps=(6.0, 4.0, 2.0))
    >>> print(draw_schedule(zb_auto(num_ranks=3, stages_per_rank=1, num_microbatches=5, costs=costs)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17
    rank 0 0F0 0F1 0F2 0F3 0F4 0I0 0W0 0I1 0W1  .  0I2 0W2  .  0I3 0W3  .  0I4 0W4
    rank 1  .  1F0 1F1 1F2 1I0 1F3 1I1 1W0 1F4 1I2 1W1 1W2 1I3 1W3  .  1I4 1W4  .
    rank 2  .   .  2F0 2I0 2F1 2I1 2W0 2F2 2I2 2W1 2F3 2I3 2W2 2F4 2I4 2W3 2W4  .
    """
    placement = one_stage_a_rank("zb-auto", num_ranks, stages_per_rank)
    if costs is None:
        costs = replace(Costs.uniform(num_ranks), memory_caps=(float(num_ranks),) * num_ranks)
    check_costs(placement, costs)
    split_1f1b = _split_1f1b(placement, num_microbatches)
    _check_caps(costs)
    handcrafted = [
        split_1f1b,
        zb_h1(num_ranks, stages_per_rank, num_microbatches),
        zb_h2(num_ranks, stages_per_rank, num_microbatches),
    ]
    planned = [
        Schedule("zb-auto", placement, num_microbatches, _Planner(costs, num_microbatches, *choices).run())
        for choices in product((False, True), repeat=2)
    ]
    candidates = planned + [schedule for schedule in handcrafted if not memory_faults(schedule, costs)]
    spans = [simulate(schedule, Flow.chain(num_ranks), costs).span_seconds for schedule in candidates]
    best = candidates[spans.index(min(spans))]
    return replace(best, name="zb-auto")


def _check_caps(costs: Costs) -> None:
    caps = costs.memory_caps or (inf,) * costs.num_stages
    faults = [
        f"rank {rank} may hold {cap:g}, and one microbatch takes {needed:g}"
        for rank, (cap, needed) in enumerate(zip(caps, costs.activation_bytes, strict=True))
        if needed > cap * (1 + ROUNDING)
    ]
    if faults:
        raise ConfigError("; ".join(faults) + ": raise the memory cap or cut the stages finer")


def _split_1f1b(placement: Placement, num_microbatches: int) -> Schedule:
    ranks = tuple(
        split_queue(rank, num_microbatches, num_warmup=placement.num_ranks - 1 - rank, num_deferred=0)
        for rank in range(placement.num_ranks)
    )
    return Schedule("zb-auto", placement, num_microbatches, ranks)


@dataclass(slots=True)
class _Rank:
    """What one rank has been given so far. `ends` are of its forwards and of its input gradients."""

    queue: list[ComputeOp]
    forward_ends: list[float]
    input_grad_ends: list[float]
    num_weight_grads: int = 0
    free: float = 0.0  # when it has done what it has been given
    idle: float = 0.0  # seconds since its first op


class _Planner:
    """Plans all ranks together. An op comes after those that it waits for, so the plan can't deadlock."""

    def __init__(self, costs: Costs, num_microbatches: int, delay_first: bool, skip_forwards: bool) -> None:
        self.costs, self.num_microbatches = costs, num_microbatches
        self.delay_first, self.skip_forwards = delay_first, skip_forwards
        self.ranks = [_Rank([], [], []) for _ in range(costs.num_stages)]
        self.last = costs.num_stages - 1
        self.delay_seconds = partial(costs.delay_seconds, placement=Placement.linear(costs.num_stages))
        caps = costs.memory_caps or (inf,) * costs.num_stages
        self.caps = [cap * (1 + ROUNDING) for cap in caps]
        self.slack_seconds = ROUNDING * max(
            costs.forward_seconds + costs.input_grad_seconds + costs.weight_grad_seconds
        )

    def run(self) -> tuple[tuple[ComputeOp, ...], ...]:
        """Return the queue of every rank."""
        for rank, num_forwards in enumerate(self._num_warmup()):
            for _ in range(num_forwards):
                self._add_forward(rank)
        for rank in range(self.last, -1, -1):
            self._add_input_grad(rank)
        # No round is empty. A rank without room holds a microbatch that waits for its gradient, so the last
        # rank to hold one either computes that gradient, or the next rank has room for the forward.
        while any(len(rank.input_grad_ends) < self.num_microbatches for rank in self.ranks):
            self._input_grad_each(self._forward_each())
        for rank in range(len(self.ranks)):
            while self.ranks[rank].num_weight_grads < self.num_microbatches:
                self._add_weight_grad(rank)
        return tuple(tuple(rank.queue) for rank in self.ranks)

    def _num_warmup(self) -> list[int]:
        """How many forwards each rank starts with, before its first input gradient."""
        ends = self._forward_only_ends()
        # Each rank leads the next one by a forward, and so has something to do while that one works.
        most: list[int] = []
        for rank, (cap, taken) in enumerate(zip(self.caps, self.costs.activation_bytes, strict=True)):
            fitting = int(min(cap / taken, self.num_microbatches)) if taken else self.num_microbatches
            most.append(max(1, min(fitting, most[-1] - 1)) if rank else fitting)
        counts = [1] * len(most)
        arrival = 0.0  # of the first gradient
        for rank in range(self.last, -1, -1):
            count = 1 if rank == self.last else min(most[rank], counts[rank + 1] + 1)
            while count < most[rank] and ends[rank][count] <= arrival + self.slack_seconds:
                count += 1
            would_idle = ends[rank][count - 1] < arrival - self.slack_seconds
            if self.delay_first and count < most[rank] and would_idle:
                count += 1
            counts[rank] = count
            arrival = max(arrival, ends[rank][count - 1]) + self.costs.input_grad_seconds[rank]
            arrival += self.delay_seconds(rank, rank - 1) if rank else 0.0
        return counts

    def _forward_only_ends(self) -> list[list[float]]:
        """When each rank's forwards would end if nothing else ran."""
        ends: list[list[float]] = []
        for rank, seconds in enumerate(self.costs.forward_seconds):
            free, row = 0.0, []
            for microbatch in range(self.num_microbatches):
                arrival = ends[rank - 1][microbatch] + self.delay_seconds(rank - 1, rank) if rank else 0.0
                free = max(free, arrival) + seconds
                row.append(free)
            ends.append(row)
        return ends

    def _forward_each(self) -> set[int]:
        """Plan a forward on each rank; return the ranks that see first what the next one sends back."""
        undecided: set[int] = set()
        for rank in range(len(self.ranks)):
            if self._may_skip_forward(rank):
                undecided.add(rank)
            else:
                self._forward_where_possible(rank)
        return undecided

    def _input_grad_each(self, undecided: set[int]) -> None:
        for rank in range(self.last, -1, -1):
            has_gradient = self._has_gradient(rank)
            latest = self.ranks[rank].free + self.slack_seconds
            skips = has_gradient and self._gradient_arrival(rank) <= latest
            if rank in undecided and not skips:
                self._forward_where_possible(rank)
            if has_gradient:
                self._fill(rank, self._gradient_arrival(rank))
                self._add_input_grad(rank)

    def _may_skip_forward(self, rank: int) -> bool:
        """Whether the next rank has a forward to go on with, so that this one's need not come first."""
        if not self.skip_forwards or rank == self.last:
            return False
        return len(self.ranks[rank].forward_ends) - len(self.ranks[rank + 1].forward_ends) > 1

    def _forward_where_possible(self, rank: int) -> None:
        state = self.ranks[rank]
        microbatch = len(state.forward_ends)
        if microbatch == self.num_microbatches:
            return
        if rank and microbatch >= len(self.ranks[rank - 1].forward_ends):
            return
        while not self._has_room(rank) and state.num_weight_grads < len(state.input_grad_ends):
            self._add_weight_grad(rank)
        if self._has_room(rank):
            self._fill(rank, self._forward_arrival(rank))
            self._add_forward(rank)

    def _fill(self, rank: int, until: float) -> None:
        """Put weight gradients before `until` that fit, or that keep the most idle rank from idling more."""
        state, seconds = self.ranks[rank], self.costs.weight_grad_seconds[rank]
        while state.num_weight_grads < len(state.input_grad_ends):
            gap = until - state.free
            most_idle = max(other.idle for other in self.ranks)
            fits = gap >= seconds - self.slack_seconds
            if gap <= self.slack_seconds or not (fits or state.idle + gap > most_idle + self.slack_seconds):
                return
            self._add_weight_grad(rank)

    def _has_room(self, rank: int) -> bool:
        state = self.ranks[rank]
        num_deferred = len(state.input_grad_ends) - state.num_weight_grads
        num_whole = len(state.forward_ends) - len(state.input_grad_ends) + 1
        held = num_whole * self.costs.activation_bytes[rank]
        return held + num_deferred * self.costs.weight_grad_bytes[rank] <= self.caps[rank]

    def _has_gradient(self, rank: int) -> bool:
        microbatch = len(self.ranks[rank].input_grad_ends)
        if microbatch == len(self.ranks[rank].forward_ends):
            return False
        return rank == self.last or microbatch < len(self.ranks[rank + 1].input_grad_ends)

    def _forward_arrival(self, rank: int) -> float:
        if rank == 0:
            return 0.0
        ends = self.ranks[rank - 1].forward_ends
        return ends[len(self.ranks[rank].forward_ends)] + self.delay_seconds(rank - 1, rank)

    def _gradient_arrival(self, rank: int) -> float:
        if rank == self.last:
            return 0.0
        ends = self.ranks[rank + 1].input_grad_ends
        return ends[len(self.ranks[rank].input_grad_ends)] + self.delay_seconds(rank + 1, rank)

    def _add_forward(self, rank: int) -> None:
        op = Forward(rank, len(self.ranks[rank].forward_ends))
        self.ranks[rank].forward_ends.append(self._add(rank, op, self._forward_arrival(rank)))

    def _add_input_grad(self, rank: int) -> None:
        op = InputGrad(rank, len(self.ranks[rank].input_grad_ends))
        self.ranks[rank].input_grad_ends.append(self._add(rank, op, self._gradient_arrival(rank)))

    def _add_weight_grad(self, rank: int) -> None:
        self._add(rank, WeightGrad(rank, self.ranks[rank].num_weight_grads), 0.0)
        self.ranks[rank].num_weight_grads += 1

    def _add(self, rank: int, op: ComputeOp, arrival: float) -> float:
        """Append an op that can't start before `arrival`; return its end."""
        state = self.ranks[rank]
        start = max(state.free, arrival)
        if state.queue:
            state.idle += start - state.free
        state.free = start + self.costs.seconds(op)
        state.queue.append(op)
        return state.free
