"""The nouns of Evenflow: ops, placements, schedules, programs, costs and timelines. Standard library only.

Everything here is frozen data without behaviour of its own, so that a plan can be made, read, checked and
simulated on a laptop that has no torch. Read `op` first.
"""

from evenflow.ir.costs import Costs, Link
from evenflow.ir.flow import Flow
from evenflow.ir.op import (
    Backward,
    CollectiveOp,
    ComputeOp,
    Exchange,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Overlap,
    Payload,
    Recv,
    ReduceGrads,
    Send,
    SimpleOp,
    TransferOp,
    Unshard,
    WeightGrad,
    parse_op,
    parts,
)
from evenflow.ir.placement import Placement
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Span, Timeline

__all__ = [
    "Backward",
    "CollectiveOp",
    "ComputeOp",
    "Costs",
    "Exchange",
    "Flow",
    "Forward",
    "Handoff",
    "InputGrad",
    "Link",
    "Op",
    "Overlap",
    "Payload",
    "Placement",
    "Program",
    "Recv",
    "ReduceGrads",
    "Schedule",
    "Send",
    "SimpleOp",
    "Span",
    "Timeline",
    "TransferOp",
    "Unshard",
    "WeightGrad",
    "parse_op",
    "parts",
]
