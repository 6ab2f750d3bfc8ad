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
from typing import ClassVar, TypeAlias, get_args

from evenflow.errors import ConfigError
from evenflow.foreign import shown


class Payload(enum.Enum):
    """What a transfer carries: a boundary value on its way forward, or its gradient on its way back.

    >>> Payload("B")
    <Payload.GRADIENT: 'B'>
    """

    ACTIVATION = "F"
    GRADIENT = "B"


@dataclass(frozen=True, slots=True)
class _OfMicrobatch:
    """What the simple ops have in common: a stage, a microbatch, and between them a letter of their own."""

    stage: int
    microbatch: int
    _letter: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.stage}{self._letter}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class _OfValue:
    """What the transfer ops have in common: a boundary value on its way from one stage to another."""

    source: int
    target: int
    microbatch: int
    payload: Payload
    _letter: ClassVar[str]

    def __str__(self) -> str:
        return f"{self._letter}{self.source}>{self.target}{self.payload.value}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class _OfStage:
    """What the collective ops have in common: a stage."""

    stage: int
    _letter: ClassVar[str]

    def __str__(self) -> str:
        return f"{self._letter}{self.stage}"


@dataclass(frozen=True, slots=True)
class Forward(_OfMicrobatch):
    """Run one stage's forward on one microbatch; text form `2F0`: stage 2, microbatch 0.

    >>> str(Forward(stage=2, microbatch=0))
    '2F0'
    """

    _letter: ClassVar[str] = "F"


@dataclass(frozen=True, slots=True)
class Backward(_OfMicrobatch):
    """Run one stage's whole backward (inputs and weights) on one microbatch; text form `2B0`.

    >>> str(Backward(stage=2, microbatch=0))
    '2B0'
    """

    _letter: ClassVar[str] = "B"


@dataclass(frozen=True, slots=True)
class InputGrad(_OfMicrobatch):
    """Run the part of a backward that earlier stages wait for: the gradients of the inputs; text form `2I0`.

    >>> str(InputGrad(stage=2, microbatch=0))
    '2I0'
    """

    _letter: ClassVar[str] = "I"


@dataclass(frozen=True, slots=True)
class WeightGrad(_OfMicrobatch):
    """Run the rest of a backward after its `InputGrad`: the gradients of the weights; text form `2W0`.

    >>> str(WeightGrad(stage=2, microbatch=0))
    '2W0'
    """

    _letter: ClassVar[str] = "W"


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
class Send(_OfValue):
    """Give a boundary value to another rank; `source` and `target` are stages; text form `S0>1F3`.

    >>> str(Send(source=0, target=1, microbatch=3, payload=Payload.ACTIVATION))
    'S0>1F3'
    """

    _letter: ClassVar[str] = "S"


@dataclass(frozen=True, slots=True)
class Recv(_OfValue):
    """Take a boundary value from another rank; `source` is the sending stage; text form `R0>1F3`.

    >>> str(Recv(source=1, target=0, microbatch=3, payload=Payload.GRADIENT))
    'R1>0B3'
    """

    _letter: ClassVar[str] = "R"


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
class Handoff(_OfValue):
    """Pass a boundary value between two stages of the same rank; text form `H0>1F3`.

    >>> str(Handoff(source=0, target=1, microbatch=3, payload=Payload.ACTIVATION))
    'H0>1F3'
    """

    _letter: ClassVar[str] = "H"


@dataclass(frozen=True, slots=True)
class ReduceGrads(_OfStage):
    """Sum one stage's gradients over the replicas of data parallelism; text form `G2`: stage 2.

    >>> str(ReduceGrads(stage=2))
    'G2'
    """

    _letter: ClassVar[str] = "G"


@dataclass(frozen=True, slots=True)
class Unshard(_OfStage):
    """Gather one stage's parameters, of which each data rank holds a part; text form `U2`: stage 2.

    >>> str(Unshard(stage=2))
    'U2'
    """

    _letter: ClassVar[str] = "U"


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

    Raises `ConfigError` for any other text, so that each op has one spelling: no leading zeros, no number of
    more than 18 digits, no group of more than 4,096 letters.

    >>> parse_op("2B0")
    Backward(stage=2, microbatch=0)
    >>> str(parse_op("S0>1F3"))
    'S0>1F3'
    """
    if len(text) > _MOST_LETTERS:
        raise ConfigError(f"an op of {len(text)} letters: there is none of more than {_MOST_LETTERS}")
    found = [_parse_single(word) for word in text.split("&")]
    if len(found) == 1 and found[0] is not None:
        return found[0]
    simple = [op for op in found if isinstance(op, SimpleOp)]
    if len(simple) == len(found) == 2:
        return Overlap(*simple)
    transfers = tuple(op for op in found if isinstance(op, Send | Recv))
    if len(transfers) == len(found):
        return Exchange(transfers)
    raise ConfigError(
        f"{shown(text)} is not an op: write a compute op as stage, one of F, B, I and W, microbatch ('2F0'), "
        "two fused ones with & ('2F3&5B1'), "
        "a transfer as S, R or H, source>target, F or B, microbatch ('S0>1F3'), "
        "grouped ones with & ('S0>1F3&R1>0B1'), a reduction of gradients as G, stage ('G2'), a gathering of "
        "parameters as U, stage ('U2')"
    )


_SIMPLE_OPS: dict[str, type[SimpleOp]] = {cls._letter: cls for cls in get_args(SimpleOp)}
_TRANSFER_OPS: dict[str, type[TransferOp]] = {cls._letter: cls for cls in get_args(TransferOp)}
_COLLECTIVE_OPS: dict[str, type[CollectiveOp]] = {cls._letter: cls for cls in get_args(CollectiveOp)}
# Of at most 18 digits: Python refuses to convert thousands of them, and 64 bits hold no more.
_NUMBER = "(0|[1-9][0-9]{0,17})"
_MOST_LETTERS = 4096  # of a group of transfers
_SIMPLE = re.compile(f"{_NUMBER}([{''.join(_SIMPLE_OPS)}]){_NUMBER}")
_TRANSFER = re.compile(f"([{''.join(_TRANSFER_OPS)}]){_NUMBER}>{_NUMBER}([FB]){_NUMBER}")
_COLLECTIVE = re.compile(f"([{''.join(_COLLECTIVE_OPS)}]){_NUMBER}")


def _parse_single(text: str) -> SimpleOp | TransferOp | CollectiveOp | None:
    if simple := _SIMPLE.fullmatch(text):
        stage, letter, microbatch = simple.groups()
        return _SIMPLE_OPS[letter](int(stage), int(microbatch))
    if transfer := _TRANSFER.fullmatch(text):
        letter, source, target, payload, microbatch = transfer.groups()
        return _TRANSFER_OPS[letter](int(source), int(target), int(microbatch), Payload(payload))
    if collective := _COLLECTIVE.fullmatch(text):
        letter, stage = collective.groups()
        return _COLLECTIVE_OPS[letter](int(stage))
    return None
