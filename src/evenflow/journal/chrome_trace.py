"""A step in the Trace Event Format, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Source: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU:
complete events ("X") in microseconds, counters ("C"), names of processes and threads ("M").
"""

import json
from collections.abc import Iterator
from typing import Any

from evenflow.ir.op import CollectiveOp, Exchange, Op, Overlap, TransferOp, parse_op, parts
from evenflow.journal.last_step import LaneRecord, LastStep

_Event = dict[str, Any]  # as the format has it: numbers, texts, objects of these
_Sizes = dict[tuple[int, int, str], int]  # bytes of an edge
_MEASURED, _PREDICTED = 1, 2  # processes of the trace


def chrome_trace(last_step: LastStep) -> str:
    """Return the trace: a process for what was measured and one for what was predicted, a thread for a rank.

    Each op carries its stage, microbatch and, of transfers, bytes; waits stand before the ops that waited.
    """
    events: list[_Event] = []
    # Perfetto drops what is before 0, and ranks wait before the first op that computes.
    first = min((lane.came_seconds[0] for lane in last_step.measured if lane.ops), default=0.0)
    sizes: _Sizes = {(edge.source, edge.target, edge.payload): edge.num_bytes for edge in last_step.edges}
    for process, name, lanes in (
        (_MEASURED, "measured", last_step.measured),
        (_PREDICTED, "predicted", last_step.predicted),
    ):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for rank, lane in enumerate(lanes):
            here = {"pid": process, "tid": rank}
            events.append({"ph": "M", "name": "thread_name", **here, "args": {"name": f"rank {rank}"}})
            events += _events(lane, first, here, sizes)
            events += (
                {
                    "ph": "C",
                    "name": f"held by rank {rank}",
                    **here,
                    "ts": _micro(end - first),
                    "args": {"bytes": held},
                }
                for end, held in zip(lane.end_seconds, lane.held_bytes, strict=False)
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _events(lane: LaneRecord, first: float, here: _Event, sizes: _Sizes) -> Iterator[_Event]:
    columns = zip(lane.ops, lane.came_seconds, lane.start_seconds, lane.end_seconds, strict=True)
    for text, came, start, end in columns:
        op = parse_op(text)
        if start > came:
            yield _complete(f"wait for {text}", "wait", came - first, start - first, here, {})
        yield _complete(text, _kind(op), start - first, end - first, here, _arguments(op, sizes))


def _complete(name: str, kind: str, start: float, end: float, here: _Event, arguments: _Event) -> _Event:
    times = {"ts": _micro(start), "dur": _micro(end - start)}
    return {"ph": "X", "name": name, "cat": kind, **here, **times, "args": arguments}


def _kind(op: Op) -> str:
    if isinstance(op, TransferOp | Exchange):
        return "transfer"
    return "collective" if isinstance(op, CollectiveOp) else type(op).__name__


def _arguments(op: Op, sizes: _Sizes) -> _Event:
    if isinstance(op, Exchange):
        return {str(each): _arguments(each, sizes) for each in op.transfers}
    if isinstance(op, Overlap):
        return {str(part): _arguments(part, sizes) for part in parts(op)}
    if isinstance(op, TransferOp):
        size = sizes.get((op.source, op.target, op.payload.value), 0)
        return {"from": op.source, "to": op.target, "microbatch": op.microbatch, "bytes": size}
    if isinstance(op, CollectiveOp):
        return {"stage": op.stage}
    return {"stage": op.stage, "microbatch": op.microbatch}


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)
