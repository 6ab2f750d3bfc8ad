"""Program: a schedule with its transfers written out, ready to be proven and then run."""

from dataclasses import dataclass

from evenflow.ir.flow import Flow
from evenflow.ir.op import Op
from evenflow.ir.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Program:
    """Every op of every rank, transfers included, with the schedule and the flow that it serves.

    `ranks[rank]` is one rank's serial queue: compute and transfers together. A program may be wrong; only
    `validate.prove` turns it into something that the executor accepts.

    >>> from evenflow.lower import lower
    >>> from evenflow.schedules.gpipe import gpipe
    >>> program = lower(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=1), Flow.chain(2))
    >>> " ".join(str(op) for op in program.ranks[0])
    '0F0 S0>1F0 R1>0B0 0B0'
    """

    schedule: Schedule
    flow: Flow
    ranks: tuple[tuple[Op, ...], ...]
