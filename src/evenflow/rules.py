"""What waits for what, and which transfer carries it. Nothing else in Evenflow knows these two rules.

`schedules` are written so that the rules can be met, `simulate` prices them, `lower` writes the transfers
that they ask for, and `validate` checks that they are met.
"""

from typing import TypeAlias, assert_never

from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, Handoff, Payload, Recv, Send
from evenflow.ir.placement import Placement

Carriers: TypeAlias = tuple[()] | tuple[Handoff] | tuple[Send, Recv]


def dependencies(op: ComputeOp, flow: Flow) -> tuple[ComputeOp, ...]:
    """Return the compute ops that must have ended before `op` may start.

    A forward waits for the forward of every stage that feeds it. A backward waits for its own forward, and
    for the backward of every stage that sends it a gradient. The order is fixed: own forward first, then
    ascending stages.

    >>> [str(op) for op in dependencies(Backward(stage=0, microbatch=3), Flow.chain(2))]
    ['0F3', '1B3']
    """
    match op:
        case Forward(stage, microbatch):
            return tuple(Forward(source, microbatch) for source in flow.activations_into(stage))
        case Backward(stage, microbatch):
            later = tuple(Backward(source, microbatch) for source in flow.gradients_into(stage))
            return (Forward(stage, microbatch), *later)
        case _:
            assert_never(op)


def carriers(producer: ComputeOp, consumer: ComputeOp, placement: Placement) -> Carriers:
    """Return the transfer ops that bring `producer`'s result to `consumer`, which depends on it.

    Nothing within a stage, a `Handoff` between two stages of a rank, a `Send` and its `Recv` between ranks.

    >>> [str(op) for op in carriers(Forward(0, 3), Forward(1, 3), Placement.linear(2))]
    ['S0>1F3', 'R0>1F3']
    """
    if producer.stage == consumer.stage:
        return ()
    payload = _payload(producer)
    if placement.rank_of[producer.stage] == placement.rank_of[consumer.stage]:
        return (Handoff(producer.stage, consumer.stage, consumer.microbatch, payload),)
    return (
        Send(producer.stage, consumer.stage, consumer.microbatch, payload),
        Recv(producer.stage, consumer.stage, consumer.microbatch, payload),
    )


def _payload(producer: ComputeOp) -> Payload:
    match producer:
        case Forward():
            return Payload.ACTIVATION
        case Backward():
            return Payload.GRADIENT
        case _:
            assert_never(producer)
