"""The nouns of Evenflow: ops, placements, schedules, programs, costs and timelines. Standard library only.

Everything here is frozen data without behaviour of its own, so that a plan can be made, read, checked and
simulated on a laptop that has no torch. Read `op` first.
"""

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import (
    Backward,
    ComputeOp,
    Forward,
    Handoff,
    Op,
    Payload,
    Recv,
    Send,
    TransferOp,
    parse_op,
)
from evenflow.ir.placement import Placement
from evenflow.ir.program import Program
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Span, Timeline

__all__ = [
    "Backward",
    "ComputeOp",
    "Costs",
    "Flow",
    "Forward",
    "Handoff",
    "Op",
    "Payload",
    "Placement",
    "Program",
    "Recv",
    "Schedule",
    "Send",
    "Span",
    "Timeline",
    "TransferOp",
    "parse_op",
]
