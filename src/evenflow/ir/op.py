"""Ops: the single steps that a rank performs, and their text form.

A *compute op* works on one microbatch in one stage, or on two at once (`Overlap`). A *transfer op* moves one
boundary value of one microbatch between two stages; it names stages and never ranks, so that only the
placement knows where a stage lives. Schedules hold compute ops; lowering adds the other ones.

A backward can be whole (`Backward`) or in two parts: `InputGrad`, which the earlier stages wait for, and
`WeightGrad`, which nobody waits for. Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024.

The union is closed: code that handles ops uses `match` and ends in `assert_never`, so that a new op makes
the type checker point at every place that must learn about it.
"""

import enum
import re
from dataclasses import dataclass
from typing import TypeAlias

from evenflow.errors import ConfigError


class Payload(enum.Enum):
    """What a transfer carries: a boundary value on its way forward, or its gradient on its way back.

    >>> Payload("B")
    <Payload.GRADIENT: 'B'>
    """

    ACTIVATION = "F"
    GRADIENT = "B"


@dataclass(frozen=True, slots=True)
class Forward:
    """Run one stage's forward on one microbatch; text form `2F0`: stage 2, microbatch 0.

    >>> str(Forward(stage=2, microbatch=0))
    '2F0'
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}F{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Backward:
    """Run one stage's whole backward (inputs and weights) on one microbatch; text form `2B0`.

    >>> str(Backward(stage=2, microbatch=0))
    '2B0'
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}B{self.microbatch}"


@dataclass(frozen=True, slots=True)
class InputGrad:
    """Run the part of a backward that earlier stages wait for: the gradients of the inputs; text form `2I0`.

    >>> str(InputGrad(stage=2, microbatch=0))
    '2I0'
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}I{self.microbatch}"


@dataclass(frozen=True, slots=True)
class WeightGrad:
    """Run the rest of a backward after its `InputGrad`: the gradients of the weights; text form `2W0`.

    >>> str(WeightGrad(stage=2, microbatch=0))
    '2W0'
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}W{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Run two ops of one rank as one fused unit, so that one computes while the other transfers.

    Neither may wait for the other. Text form `2F3&5B1`. Source: DeepSeek-AI, "DeepSeek-V3 Technical Report",
    2024, arXiv:2412.19437, section 3.2.1 (DualPipe).

    >>> str(Overlap(Forward(stage=2, microbatch=3), Backward(stage=5, microbatch=1)))
    '2F3&5B1'
    """

    first: "SimpleOp"
    second: "SimpleOp"

    def __str__(self) -> str:
        return f"{self.first}&{self.second}"


@dataclass(frozen=True, slots=True)
class Send:
    """Give a boundary value to another rank; `source` and `target` are stages; text form `S0>1F3`.

    >>> str(Send(source=0, target=1, microbatch=3, payload=Payload.ACTIVATION))
    'S0>1F3'
    """

    source: int
    target: int
    microbatch: int
    payload: Payload

    def __str__(self) -> str:
        return f"S{_route(self)}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Take a boundary value from another rank; `source` is the sending stage; text form `R0>1F3`.

    >>> str(Recv(source=1, target=0, microbatch=3, payload=Payload.GRADIENT))
    'R1>0B3'
    """

    source: int
    target: int
    microbatch: int
    payload: Payload

    def __str__(self) -> str:
        return f"R{_route(self)}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Do several sends and receives as one group, in any order among them; text form `S0>1F3&R1>0B1`.

    The rank goes on when all have ended. It is NCCL's group call: two ranks that send to each other at the
    same time deadlock with single transfers, and do not with a group on either side.

    >>> send, recv = Send(0, 1, 3, Payload.ACTIVATION), Recv(1, 0, 1, Payload.GRADIENT)
    >>> str(Exchange((send, recv)))
    'S0>1F3&R1>0B1'
    """

    transfers: "tuple[Send | Recv, ...]"

    def __str__(self) -> str:
        return "&".join(str(transfer) for transfer in self.transfers)


@dataclass(frozen=True, slots=True)
class Handoff:
    """Pass a boundary value between two stages of the same rank; text form `H0>1F3`.

    >>> str(Handoff(source=0, target=1, microbatch=3, payload=Payload.ACTIVATION))
    'H0>1F3'
    """

    source: int
    target: int
    microbatch: int
    payload: Payload

    def __str__(self) -> str:
        return f"H{_route(self)}"


@dataclass(frozen=True, slots=True)
class ReduceGrads:
    """Sum one stage's gradients over the replicas of data parallelism; text form `G2`: stage 2.

    >>> str(ReduceGrads(stage=2))
    'G2'
    """

    stage: int

    def __str__(self) -> str:
        return f"G{self.stage}"


@dataclass(frozen=True, slots=True)
class Unshard:
    """Gather one stage's parameters, of which each data rank holds a part; text form `U2`: stage 2.

    >>> str(Unshard(stage=2))
    'U2'
    """

    stage: int

    def __str__(self) -> str:
        return f"U{self.stage}"


SimpleOp: TypeAlias = Forward | Backward | InputGrad | WeightGrad
ComputeOp: TypeAlias = SimpleOp | Overlap
TransferOp: TypeAlias = Send | Recv | Handoff
CollectiveOp: TypeAlias = Unshard | ReduceGrads  # what the data ranks do together
Op: TypeAlias = ComputeOp | TransferOp | Exchange | CollectiveOp


def parts(op: ComputeOp) -> tuple[SimpleOp, ...]:
    """Return the ops that a compute op consists of: the two of an `Overlap`, or the op itself.

    >>> print(*parts(Overlap(Forward(2, 3), Backward(5, 1))))
    2F3 5B1
    """
    return (op.first, op.second) if isinstance(op, Overlap) else (op,)


def parse_op(text: str) -> Op:
    """Read one op from its text form; the inverse of `str(op)`.

    Raises `ConfigError` for any other text, leading zeros included, so that each op has one spelling.

    >>> parse_op("2B0")
    Backward(stage=2, microbatch=0)
    >>> str(parse_op("S0>1F3"))
    'S0>1F3'
    """
    if collective := _COLLECTIVE.fullmatch(text):
        letter, stage = collective.groups()
        return _COLLECTIVE_OF[letter](int(stage))
    found = [_parse_single(word) for word in text.split("&")]
    match found:
        case [Forward() | Backward() | InputGrad() | WeightGrad() | Send() | Recv() | Handoff() as op]:
            return op
        case [
            Forward() | Backward() | InputGrad() | WeightGrad() as first,
            Forward() | Backward() | InputGrad() | WeightGrad() as second,
        ]:
            return Overlap(first, second)
    transfers = tuple(op for op in found if isinstance(op, Send | Recv))
    if len(transfers) == len(found):
        return Exchange(transfers)
    raise ConfigError(
        f"{text!r} is not an op: write a compute op as stage, one of F, B, I and W, microbatch ('2F0'), "
        "two fused ones with & ('2F3&5B1'), "
        "a transfer as S, R or H, source>target, F or B, microbatch ('S0>1F3'), "
        "grouped ones with & ('S0>1F3&R1>0B1'), a reduction of gradients as G, stage ('G2'), a gathering of "
        "parameters as U, stage ('U2')"
    )


def _parse_single(text: str) -> SimpleOp | TransferOp | None:
    if compute := _COMPUTE.fullmatch(text):
        stage, letter, microbatch = compute.groups()
        return _COMPUTE_OF[letter](int(stage), int(microbatch))
    if transfer := _TRANSFER.fullmatch(text):
        letter, source, target, payload, microbatch = transfer.groups()
        return _TRANSFER_OF[letter](int(source), int(target), int(microbatch), Payload(payload))
    return None


def _route(transfer: TransferOp) -> str:
    return f"{transfer.source}>{transfer.target}{transfer.payload.value}{transfer.microbatch}"


_NUMBER = "(0|[1-9][0-9]*)"
_COMPUTE = re.compile(f"{_NUMBER}([FBIW]){_NUMBER}")
_TRANSFER = re.compile(f"([SRH]){_NUMBER}>{_NUMBER}([FB]){_NUMBER}")
_COLLECTIVE = re.compile(f"([GU]){_NUMBER}")
_COMPUTE_OF: dict[str, type[SimpleOp]] = {"F": Forward, "B": Backward, "I": InputGrad, "W": WeightGrad}
_COLLECTIVE_OF: dict[str, type[CollectiveOp]] = {"G": ReduceGrads, "U": Unshard}
_TRANSFER_OF: dict[str, type[TransferOp]] = {"S": Send, "R": Recv, "H": Handoff}
