"""Soundness: is every op there, once, and on its rank? And how faults are reported.

These are the checks that hold for a schedule and for a program alike, so `simulate`, `lower` and `validate`
share them. Faults are collected and never raised one by one: a user who mends three mistakes wants to read of
all three.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from evenflow.errors import ScheduleError
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, Op
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule

# One missing op can have thousands of consequences; beyond these bounds a report is no longer read.
_MAX_FAULTS = 20
_MAX_RANKS = 16
_MAX_COLUMNS = 100


def schedule_faults(schedule: Schedule, flow: Flow, queues: Sequence[Sequence[ComputeOp]]) -> list[str]:
    """Return what is wrong with the compute ops in `queues` (one a rank) as a form of `schedule`.

    Checked: as many queues as ranks; the flow names stages that exist; every op exists, stands on the rank
    that the placement says, and stands once; no forward is missing, and no backward unless all are.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=1, stages_per_rank=1, num_microbatches=1)
    >>> schedule_faults(schedule, Flow.chain(1), [[Backward(0, 0)]])
    ['0F0 is missing: rank 0 must run it']
    """
    placement = schedule.placement
    faults = flow_faults(flow, placement.num_stages)
    if len(queues) != placement.num_ranks:
        faults.append(f"{len(queues)} queues for {placement.num_ranks} ranks: give each rank one")
    for rank, queue in enumerate(queues):
        faults += _misplaced(rank, queue, placement, schedule.num_microbatches)
    counts = Counter(op for queue in queues for op in queue)
    faults += [f"{op} stands {count} times: run it once" for op, count in counts.items() if count > 1]
    trains = any(isinstance(op, Backward) for op in counts)
    faults += [
        f"{op} is missing: rank {placement.rank_of[op.stage]} must run it"
        for op in complete_ops(schedule, trains=trains)
        if op not in counts
    ]
    return faults


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
    lines += [f"  - {fault}" for fault in faults[:_MAX_FAULTS]]
    if len(faults) > _MAX_FAULTS:
        lines.append(f"  and {len(faults) - _MAX_FAULTS} more")
    lines.append("in the queues:")
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


def complete_ops(schedule: Schedule, *, trains: bool) -> Iterator[ComputeOp]:
    """Yield every compute op that a complete schedule of these sizes holds, with backwards if it trains.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> print(*complete_ops(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=1), trains=True))
    0F0 0B0 1F0 1B0
    """
    for stage in range(schedule.placement.num_stages):
        for microbatch in range(schedule.num_microbatches):
            yield Forward(stage, microbatch)
            if trains:
                yield Backward(stage, microbatch)


def _misplaced(
    rank: int, queue: Sequence[ComputeOp], placement: Placement, num_microbatches: int
) -> Iterator[str]:
    for op in queue:
        if not 0 <= op.stage < placement.num_stages:
            yield f"{op} on rank {rank}: there are only stages 0..{placement.num_stages - 1}"
        elif not 0 <= op.microbatch < num_microbatches:
            yield f"{op} on rank {rank}: there are only microbatches 0..{num_microbatches - 1}"
        elif placement.rank_of[op.stage] != rank:
            yield f"{op} on rank {rank}: stage {op.stage} lives on rank {placement.rank_of[op.stage]}"


def _excerpt(queue: Sequence[Op], start: int) -> str:
    words = ["..."] if start > 0 else []
    for position in range(start, len(queue)):
        word = str(queue[position])
        if sum(len(known) + 1 for known in words) + len(word) > _MAX_COLUMNS:
            return " ".join([*words, f"... ({len(queue) - position} more)"])
        words.append(word)
    return " ".join(words)
