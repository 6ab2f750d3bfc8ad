"""What waits for what, and which transfer carries it. Nothing else in Evenflow knows these two rules.

`schedules` are written so that the rules can be met, `simulate` prices them, `lower` writes the transfers
that they ask for, and `validate` checks that they are met.

A backward is whole in some schedules and in two parts in others. So ops do not wait for ops but for
*results*: a forward's outputs, the gradients of a stage's inputs, those of its weights. A whole `Backward`
makes the last two at once. A result is written as the op that makes it alone.
"""

from typing import TypeAlias, assert_never

from evenflow.ir.flow import Flow
from evenflow.ir.op import (
    Backward,
    ComputeOp,
    Forward,
    Handoff,
    InputGrad,
    Overlap,
    Payload,
    Recv,
    ReduceGrads,
    Send,
    WeightGrad,
)
from evenflow.ir.placement import Placement

Result: TypeAlias = Forward | InputGrad | WeightGrad
Carriers: TypeAlias = tuple[()] | tuple[Handoff] | tuple[Send, Recv]


def results(op: ComputeOp) -> tuple[Result, ...]:
    """Return what an op makes.

    >>> print(*results(Backward(stage=1, microbatch=2)))
    1I2 1W2
    """
    match op:
        case Forward() | InputGrad() | WeightGrad():
            return (op,)
        case Backward(stage, microbatch):
            return (InputGrad(stage, microbatch), WeightGrad(stage, microbatch))
        case Overlap(first, second):
            return results(first) + results(second)


def dependencies(op: ComputeOp, flow: Flow) -> tuple[Result, ...]:
    """Return the results that must be there before `op` may start.

    A forward waits for the forward of every stage that feeds it. An input gradient, alone or in a whole
    backward, waits for its own forward, and for the input gradient of every stage that sends it one. A
    weight gradient waits for its own input gradient. An overlap waits for all that its two ops wait for. The
    order is fixed: what its own stage makes first, then ascending stages.

    >>> [str(result) for result in dependencies(Backward(stage=0, microbatch=3), Flow.chain(2))]
    ['0F3', '1I3']
    """
    match op:
        case Forward(stage, microbatch):
            return tuple(Forward(source, microbatch) for source in flow.activations_into(stage))
        case Backward(stage, microbatch) | InputGrad(stage, microbatch):
            later = tuple(InputGrad(source, microbatch) for source in flow.gradients_into(stage))
            return (Forward(stage, microbatch), *later)
        case WeightGrad(stage, microbatch):
            return (InputGrad(stage, microbatch),)
        case Overlap(first, second):
            return tuple(dict.fromkeys(dependencies(first, flow) + dependencies(second, flow)))


def reduced(op: ReduceGrads, num_microbatches: int) -> tuple[WeightGrad, ...]:
    """Return the results that a reduction of gradients waits for: all that its stage adds up in a step.

    >>> print(*reduced(ReduceGrads(stage=1), num_microbatches=3))
    1W0 1W1 1W2
    """
    return tuple(WeightGrad(op.stage, microbatch) for microbatch in range(num_microbatches))


def carriers(result: Result, target: int, placement: Placement) -> Carriers:
    """Return the transfer ops that bring a result to the stage `target`, which depends on it.

    Nothing within a stage, a `Handoff` between two stages of a rank, a `Send` and its `Recv` between ranks.

    >>> [str(op) for op in carriers(Forward(0, 3), 1, Placement.linear(2))]
    ['S0>1F3', 'R0>1F3']
    """
    source, microbatch = result.stage, result.microbatch
    if source == target:
        return ()
    payload = _payload(result)
    if placement.rank_of[source] == placement.rank_of[target]:
        return (Handoff(source, target, microbatch, payload),)
    return (Send(source, target, microbatch, payload), Recv(source, target, microbatch, payload))


def _payload(result: Result) -> Payload:
    match result:
        case Forward():
            return Payload.ACTIVATION
        case InputGrad():
            return Payload.GRADIENT
        case WeightGrad():
            raise AssertionError(f"{result} never leaves its stage")
        case _:
            assert_never(result)
