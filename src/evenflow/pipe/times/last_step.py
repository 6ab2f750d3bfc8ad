"""The last step of a pipeline as a record: the cut, and what each rank did when, and held."""

from evenflow.graph.cutting.cut import Cut
from evenflow.ir.op import ComputeOp, Payload
from evenflow.ir.timeline import Timeline
from evenflow.journal.last_step import EdgeRecord, HeldStage, LaneRecord, LastStep, first_start, lane_record
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.times.devices import caps_bytes
from evenflow.pipe.times.times import Times
from evenflow.plan.blocks import block_of
from evenflow.runtime.stages.narrowing import Narrowing


def last_step(parts: Parts, times: Times) -> LastStep:
    """Put it together; collective, and the same on all ranks of a pipeline. Raises as `Times.last`."""
    last = times.last(parts.world)
    origin = first_start(last.rows)
    return LastStep(
        predicted=_lanes_of(last.predicted),
        measured=tuple(
            lane_record(rows, origin=origin, held_bytes=held)
            for rows, held in zip(last.rows, last.held_bytes, strict=True)
        ),
        predicted_bills=last.predicted_bills,
        measured_bills=last.measured_bills,
        stages=tuple(
            HeldStage(
                each.rank, _modules(last.cut, each.stage), each.num_nodes, each.num_parameters, each.share
            )
            for each in parts.summaries
        ),
        edges=_edges(last.cut, parts.narrowing),
        caps_bytes=caps_bytes(parts),
    )


def _lanes_of(timeline: Timeline) -> tuple[LaneRecord, ...]:
    lanes = []
    for lane in timeline.lanes:
        columns = zip(lane.ops, lane.start_seconds, lane.end_seconds, strict=True)
        lanes.append([(op, start, start, end) for op, start, end in columns if isinstance(op, ComputeOp)])
    origin = first_start(lanes)
    return tuple(lane_record(rows, origin=origin) for rows in lanes)


def _modules(cut: Cut, stage: int) -> tuple[str, ...]:
    """What a stage is made of: whole blocks of the model's lists, and other nodes by their names."""
    names = (node.name for node in cut.sections[stage].nodes)
    return tuple(dict.fromkeys(block_of(name) or name for name in names))


def _edges(cut: Cut, narrowing: Narrowing) -> tuple[EdgeRecord, ...]:
    return tuple(
        EdgeRecord(
            section.stage,
            target,
            payload.value,
            len(values),
            sum(narrowing.num_bytes(cut.graph.values[value].info) for value in values),
        )
        for section in cut.sections
        for payload, sends in (
            (Payload.ACTIVATION, section.sends),
            (Payload.GRADIENT, section.gradient_sends),
        )
        for target, values in sorted(sends.items())
    )
