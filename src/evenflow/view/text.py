"""Text: draw schedules and timelines with letters, for terminals, docstrings and error messages."""

from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, WeightGrad, parts
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Lane, Timeline
from evenflow.simulate import simulate
from evenflow.view.columns import computes, origin_seconds

_FILLS: dict[type[ComputeOp], str] = {
    Forward: ">",
    Backward: "<",
    InputGrad: "-",
    WeightGrad: "=",
    Overlap: "x",
}


def draw_schedule(schedule: Schedule) -> str:
    """Return a table of the schedule: a row for each rank, and a column for the time of one forward.

    It is drawn as if the stages were an equal chain, a backward took two forwards and each of its halves one,
    and transfers took nothing. A dash continues an op, a dot is an idle slot. Raises `ScheduleError` for a
    schedule that can't be executed.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> print(draw_schedule(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2)))
    time   0   1   2   3   4   5   6   7   8
    rank 0 0F0 0F1  .   .   .  0B0 --- 0B1 ---
    rank 1  .  1F0 1F1 1B0 --- 1B1 ---  .   .
    """
    num_stages = schedule.placement.num_stages
    timeline = simulate(schedule, Flow.chain(num_stages), Costs.uniform(num_stages))
    num_slots = round(timeline.makespan_seconds)
    longest = max(len(str(op)) for queue in schedule.ranks for op in queue)
    width = max(len(str(num_slots - 1)), longest)
    head = max(len("time"), len(f"rank {timeline.num_ranks - 1}"))
    rows = [["time".ljust(head), *(str(slot).ljust(width) for slot in range(num_slots))]]
    for rank in range(timeline.num_ranks):
        slots = [".".center(width)] * num_slots
        for span in timeline.compute_on(rank):
            start, end = round(span.start_seconds), round(span.end_seconds)
            slots[start:end] = [str(span.op).ljust(width)] + ["-" * width] * (end - start - 1)
        rows.append([f"rank {rank}".ljust(head), *slots])
    return "\n".join(" ".join(row).rstrip() for row in rows)


def draw_timeline(timeline: Timeline, width: int = 100) -> str:
    """Return the compute spans of a timeline to scale, a lane for each rank, in `width` characters of time.

    A forward is drawn with `>`, a backward with `<`, an input gradient alone with `-`, a weight gradient with
    `=` and an overlap with `x`, named by its op, or by its microbatch where that is all that fits; blanks are
    idle. Beside each lane stands how much of the makespan the rank was busy;
    beneath all, the makespan in milliseconds and the bubble. Raises `ConfigError` for a width below 10.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> timeline = simulate(gpipe(2, 1, 2), Flow.chain(2), Costs.uniform(2, 0.001, 0.001, 0.001))
    >>> print(draw_timeline(timeline, width=54))
    rank 0 |0F0>>>0F1>>>                  0B0<<<<<<<<<0B1<<<<<<<<<|  67% busy
    rank 1 |      1F0>>>1F1>>>1B0<<<<<<<<<1B1<<<<<<<<<            |  67% busy
    makespan 9.000 ms, bubble 33.3%
    """
    if width < 10:
        raise ConfigError(f"width must be at least 10 characters, got {width}")
    makespan, origin = timeline.makespan_seconds, origin_seconds(timeline)
    head = len(f"rank {timeline.num_ranks - 1}")
    lines = []
    for rank, lane in enumerate(timeline.lanes):
        drawn = _drawn(lane, origin, width / makespan if makespan > 0 else 0.0, width)
        busy = lane.busy_seconds / makespan if makespan > 0 else 0.0
        lines.append(f"{f'rank {rank}'.ljust(head)} |{drawn}| {busy:4.0%} busy")
    lines.append(f"makespan {makespan * 1e3:.3f} ms, bubble {timeline.bubble:.1%}")
    return "\n".join(lines)


def _drawn(lane: Lane, origin: float, columns_per_second: float, width: int) -> str:
    boxes: list[tuple[ComputeOp, int, int]] = []
    for op, start_seconds, end_seconds in computes(lane):
        # Both ends are rounded alike, so that ops that touch neither overlap nor part. Even the shortest
        # gets a column.
        start = min(round((start_seconds - origin) * columns_per_second), width - 1)
        end = max(start + 1, round((end_seconds - origin) * columns_per_second))
        boxes.append((op, start, end))
    # One form of name for all boxes of a kind, or the eye takes the difference for a meaning.
    roomy = {
        kind: all(len(str(op)) < end - start for op, start, end in boxes if isinstance(op, kind))
        for kind in _FILLS
    }
    columns = [" "] * width
    for op, start, end in boxes:
        name = str(op) if roomy[type(op)] else "&".join(str(part.microbatch) for part in parts(op))
        # A name leaves a column to its fill, which tells the kind and parts neighbours.
        columns[start:end] = (name if len(name) < end - start else "").ljust(end - start, _FILLS[type(op)])
    return "".join(columns)
