"""Ops: the single steps that a rank performs, and their text form.

A *compute op* works on one microbatch in one stage. A *transfer op* moves one boundary value of one
microbatch between two stages; it names stages and never ranks, so that only the placement knows where a
stage lives. Schedules hold compute ops; lowering adds the transfer ops.

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


ComputeOp: TypeAlias = Forward | Backward
TransferOp: TypeAlias = Send | Recv | Handoff
Op: TypeAlias = ComputeOp | TransferOp


def parse_op(text: str) -> Op:
    """Read one op from its text form; the inverse of `str(op)`.

    Raises `ConfigError` for any other text, leading zeros included, so that each op has one spelling.

    >>> parse_op("2B0")
    Backward(stage=2, microbatch=0)
    >>> str(parse_op("S0>1F3"))
    'S0>1F3'
    """
    if compute := _COMPUTE.fullmatch(text):
        stage, letter, microbatch = compute.groups()
        return _COMPUTE_OF[letter](int(stage), int(microbatch))
    if transfer := _TRANSFER.fullmatch(text):
        letter, source, target, payload, microbatch = transfer.groups()
        return _TRANSFER_OF[letter](int(source), int(target), int(microbatch), Payload(payload))
    raise ConfigError(
        f"{text!r} is not an op: write a compute op as stage, F or B, microbatch ('2F0'), "
        "a transfer as S, R or H, source>target, F or B, microbatch ('S0>1F3')"
    )


def _route(transfer: TransferOp) -> str:
    return f"{transfer.source}>{transfer.target}{transfer.payload.value}{transfer.microbatch}"


_NUMBER = "(0|[1-9][0-9]*)"
_COMPUTE = re.compile(f"{_NUMBER}([FB]){_NUMBER}")
_TRANSFER = re.compile(f"([SRH]){_NUMBER}>{_NUMBER}([FB]){_NUMBER}")
_COMPUTE_OF: dict[str, type[Forward] | type[Backward]] = {"F": Forward, "B": Backward}
_TRANSFER_OF: dict[str, type[Send] | type[Recv] | type[Handoff]] = {"S": Send, "R": Recv, "H": Handoff}
