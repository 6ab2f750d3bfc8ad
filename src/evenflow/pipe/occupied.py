"""For how long an op keeps its rank: with all that handing its values over takes."""

from collections.abc import Iterator, Sequence

from evenflow.bill import Ran
from evenflow.ir.flow import Flow
from evenflow.ir.op import ComputeOp
from evenflow.ir.timeline import Span
from evenflow.rules import Result, dependencies, results


def occupied(ranks: Sequence[Ran], flow: Flow) -> list[Span]:
    """A span for each op that computes, from when its rank and its inputs were there until the rank was free.

    Between lie the receiving, the computing and the sending. So if each op takes just as long again, a
    simulation in which nothing else takes time gives each op's start.

    >>> from evenflow.ir.op import Forward, Payload, Recv, Send
    >>> sent = Send(0, 1, 0, Payload.ACTIVATION), Recv(0, 1, 0, Payload.ACTIVATION)
    >>> first = Ran([(Forward(0, 0), 0.0, 0.0, 2.0), (sent[0], 2.0, 2.0, 2.25)], 0.0, 2.25)
    >>> second = Ran([(sent[1], 0.0, 0.0, 0.0), (Forward(1, 0), 0.0, 2.5, 4.0)], 0.0, 4.0)
    >>> [(span.start_seconds, span.end_seconds) for span in occupied([first, second], Flow.chain(2))]
    [(0.0, 2.25), (2.25, 4.0)]
    """
    computed = [list(_computed(ran)) for ran in ranks]
    made: dict[Result, float] = {}
    for ops in computed:
        for op, _, _, free in ops:
            made.update(dict.fromkeys(results(op), free))
    return [
        # A value may be taken before the rank that has sent it is free.
        Span(rank, op, min(max([began, *(made[each] for each in dependencies(op, flow))]), started), free)
        for rank, ops in enumerate(computed)
        for op, began, started, free in ops
    ]


def _computed(ran: Ran) -> Iterator[tuple[ComputeOp, float, float, float]]:
    """Each op that computes: when its rank came to it, when it started, when the rank came to the next."""
    computing = [(op, began, started) for op, began, started, _ in ran.ops if isinstance(op, ComputeOp)]
    came = [began for _, began, _ in computing[1:]]
    for (op, began, started), free in zip(computing, [*came, ran.ops[-1][-1]], strict=True):
        yield op, began, started, free
