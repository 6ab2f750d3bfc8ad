"""Soundness: is every op there, once, and on its rank? And how faults are reported.

These are the checks that hold for a schedule and for a program alike, so `simulate`, `lower` and `validate`
share them. Faults are collected and never raised one by one: a user who mends three mistakes wants to read of
all three.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from evenflow.errors import ConfigError, ScheduleError, listed
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import (
    Backward,
    ComputeOp,
    Forward,
    InputGrad,
    Op,
    Overlap,
    SimpleOp,
    WeightGrad,
    parts,
)
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.rules import Result, dependencies, results

# The results of a stage and microbatch by number: outputs, input gradients, weight gradients.
_F_I_W = (0, 1, 2)
_KINDS: dict[type[SimpleOp], tuple[int, ...]] = {
    Forward: (0,),
    Backward: (1, 2),
    InputGrad: (1,),
    WeightGrad: (2,),
}

# What a drawing of the queues shows of them.
_MAX_RANKS = 16
_MAX_COLUMNS = 100
_MOST_MISSING = 100_000  # ops; where more may be missing they are not looked for one by one


def schedule_faults(schedule: Schedule, flow: Flow, queues: Sequence[Sequence[ComputeOp]]) -> list[str]:
    """Return what is wrong with the compute ops in `queues` (one a rank) as a form of `schedule`.

    Checked: as many queues as ranks; the flow names stages that exist; every op exists and stands on the rank
    that the placement says; no result is made twice, by a whole backward and one in parts, say; no overlap
    waits for itself; no forward is missing, and no backward unless all are.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=1, stages_per_rank=1, num_microbatches=1)
    >>> schedule_faults(schedule, Flow.chain(1), [[Backward(0, 0)]])
    ['0F0 is missing: rank 0 must run it']
    """
    placement = schedule.placement
    faults = flow_faults(flow, placement.num_stages)
    if len(queues) != placement.num_ranks:
        faults.append(f"{len(queues)} queues for {placement.num_ranks} ranks: give each rank one")
    if too_few := _far_too_few(schedule, queues):
        return [*faults, too_few]
    census = _Census(schedule)
    for rank, queue in enumerate(queues):
        faults += census.count(rank, queue)
    faults += [
        f"{op}: {op.second} and {op.first} wait for each other's results; run one after the other"
        for queue in queues
        if Overlap in set(map(type, queue))
        for op in queue
        if isinstance(op, Overlap) and _waits_within(op, flow)
    ]
    return [*faults, *census.repeated(queues), *census.missing()]


def _far_too_few(schedule: Schedule, queues: Sequence[Sequence[ComputeOp]]) -> str | None:
    """The fault of queues that hold so much less than all forwards that not even these are counted.

    A file of few ops may name as many stages as microbatches, and the product would fill the memory.
    """
    num_stages, num_microbatches = schedule.placement.num_stages, schedule.num_microbatches
    num_forwards = num_stages * num_microbatches
    if num_forwards <= _MOST_MISSING or num_forwards <= (found := sum(map(_num_parts, queues))):
        return None
    return (
        f"{num_stages} stages and {num_microbatches} microbatches take at least {num_forwards:,} ops, and "
        f"there are {found:,}: run each stage's forward of each microbatch"
    )


def _num_parts(queue: Sequence[ComputeOp]) -> int:
    return sum(1 for _ in _simple_ops(queue))


class _Census:
    """How often each result is made. Numbers and no sets, as schedules of 64 ranks hold 400,000 results."""

    def __init__(self, schedule: Schedule) -> None:
        self._placement, self._num_microbatches = schedule.placement, schedule.num_microbatches
        # By kind of result (F, I, W), then stage, then microbatch; counts end at 2, which means repeated.
        self._counts = bytearray(3 * self._placement.num_stages * self._num_microbatches)

    def count(self, rank: int, queue: Sequence[ComputeOp]) -> list[str]:
        """Count what one rank's queue makes; return a fault for each op that can't stand there."""
        rank_of, num_microbatches, counts = self._placement.rank_of, self._num_microbatches, self._counts
        num_stages = len(rank_of)
        kind_size = num_stages * num_microbatches
        begins = {kind: [number * kind_size for number in numbers] for kind, numbers in _KINDS.items()}
        faults = []
        for op in _simple_ops(queue):
            stage, microbatch = op.stage, op.microbatch
            exists = 0 <= stage < num_stages and 0 <= microbatch < num_microbatches
            if not exists or rank_of[stage] != rank:
                faults.append(_misplaced(op, rank, self._placement, num_microbatches))
            if exists:
                for begin in begins[type(op)]:
                    at = begin + stage * num_microbatches + microbatch
                    if counts[at] < 2:
                        counts[at] += 1
        return faults

    def repeated(self, queues: Sequence[Sequence[ComputeOp]]) -> Iterator[str]:
        """Yield a fault for each result that is made more than once, naming the ops that make it."""
        if 2 not in self._counts:
            return
        makers: dict[Result, list[ComputeOp]] = {}
        for queue in queues:
            for op in queue:
                for result in results(op):
                    makers.setdefault(result, []).append(op)
        told: set[tuple[ComputeOp, ...]] = set()
        for ops in makers.values():
            if len(ops) > 1 and tuple(ops) not in told:
                told.add(tuple(ops))
                if len(set(ops)) == 1:
                    yield f"{ops[0]} stands {len(ops)} times: run it once"
                else:
                    yield f"{' and '.join(str(op) for op in ops)} do the same work: keep one of them"

    def missing(self) -> Iterator[str]:
        """Yield a fault for each op that a complete schedule holds and this one does not."""
        num_microbatches = self._num_microbatches
        kind_size = self._placement.num_stages * num_microbatches
        trains = any(self._counts[kind_size:])
        if 0 not in (self._counts if trains else self._counts[:kind_size]):
            return
        for stage, rank in enumerate(self._placement.rank_of):
            for microbatch in range(num_microbatches):
                made = [
                    self._counts[kind * kind_size + stage * num_microbatches + microbatch] for kind in _F_I_W
                ]
                for op in _lacking(stage, microbatch, made, trains=trains):
                    yield f"{op} is missing: rank {rank} must run it"


def refusal(
    name: str, faults: Sequence[str], queues: Sequence[Sequence[Op]], starts: Sequence[int]
) -> ScheduleError:
    """Return the error that tells all `faults` of a schedule, beside a drawing of its queues.

    `starts[rank]` is the first op to draw of that rank, so that a long queue shows where it went wrong.

    >>> print(refusal("gpipe", ["0F0 is missing"], [[Forward(0, 1)]], starts=[0]))
    schedule 'gpipe' has 1 fault:
      - 0F0 is missing
    in the queues:
      rank 0: 0F1
    """
    lines = [f"schedule {name!r} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"]
    lines += [*listed(faults), "in the queues:"]
    lines += [
        f"  rank {rank}: {_excerpt(queue, start)}"
        for rank, (queue, start) in enumerate(zip(queues[:_MAX_RANKS], starts, strict=False))
    ]
    if len(queues) > _MAX_RANKS:
        lines.append(f"  and {len(queues) - _MAX_RANKS} more ranks")
    return ScheduleError("\n".join(lines))


def flow_faults(flow: Flow, num_stages: int) -> list[str]:
    """Return a fault for each edge that names a stage beyond `num_stages`.

    >>> flow_faults(Flow.chain(3), num_stages=2)
    ['flow edge 1>2 names a stage outside 0..1', 'flow edge 2>1 names a stage outside 0..1']
    """
    return [
        f"flow edge {source}>{target} names a stage outside 0..{num_stages - 1}"
        for source, target in sorted(flow.activations | flow.gradients)
        if min(source, target) < 0 or max(source, target) >= num_stages
    ]


def check_costs(placement: Placement, costs: Costs) -> None:
    """Raise `ConfigError` for costs of another number of stages, or caps of another number of ranks.

    >>> check_costs(Placement.linear(2), Costs.uniform(3))
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: costs name 3 stages, and 2 are placed: price each stage
    """
    if costs.num_stages != placement.num_stages:
        raise ConfigError(
            f"costs name {costs.num_stages} stages, and {placement.num_stages} are placed: price each stage"
        )
    if costs.memory_caps is not None and len(costs.memory_caps) != placement.num_ranks:
        raise ConfigError(
            f"memory_caps name {len(costs.memory_caps)} ranks, and there are {placement.num_ranks}: give "
            "each rank one"
        )


def _simple_ops(queue: Sequence[ComputeOp]) -> Iterable[SimpleOp]:
    """The ops of a queue, overlaps taken apart. Nearly no queue has any, which its types tell at once."""
    if Overlap in set(map(type, queue)):
        return (part for op in queue for part in parts(op))
    return cast("Sequence[SimpleOp]", queue)  # without overlaps all ops are simple


def _lacking(stage: int, microbatch: int, made: Sequence[int], *, trains: bool) -> Iterator[ComputeOp]:
    forward, input_grad, weight_grad = made
    if not forward:
        yield Forward(stage, microbatch)
    if trains and not input_grad and not weight_grad:
        yield Backward(stage, microbatch)
    elif trains and not input_grad:
        yield InputGrad(stage, microbatch)
    elif trains and not weight_grad:
        yield WeightGrad(stage, microbatch)


def _waits_within(op: Overlap, flow: Flow) -> bool:
    return not set(results(op)).isdisjoint(dependencies(op, flow))


def _misplaced(op: SimpleOp, rank: int, placement: Placement, num_microbatches: int) -> str:
    if not 0 <= op.stage < placement.num_stages:
        return f"{op} on rank {rank}: there are only stages 0..{placement.num_stages - 1}"
    if not 0 <= op.microbatch < num_microbatches:
        return f"{op} on rank {rank}: there are only microbatches 0..{num_microbatches - 1}"
    return f"{op} on rank {rank}: stage {op.stage} lives on rank {placement.rank_of[op.stage]}"


def _excerpt(queue: Sequence[Op], start: int) -> str:
    words = ["..."] if start > 0 else []
    for position in range(start, len(queue)):
        word = str(queue[position])
        if sum(len(known) + 1 for known in words) + len(word) > _MAX_COLUMNS:
            return " ".join([*words, f"... ({len(queue) - position} more)"])
        words.append(word)
    return " ".join(words)
