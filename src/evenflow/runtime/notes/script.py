"""A rank's ops, and what is known of each before the first step: what it waits for, what ends with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evenflow.ir.op import (
    ComputeOp,
    Exchange,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Payload,
    Recv,
    ReduceGrads,
    Send,
    Unshard,
    parts,
)

Key = tuple[int, int]  # (stage, microbatch)


@dataclass(frozen=True, slots=True)
class Line:
    """One op. `takes` are the receives that its computing waits for, `ends` what is in flight till then."""

    op: Op
    takes: tuple[Recv, ...]
    ends: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A rank's ops in their order, and its receives; `split` has those whose backward is in two parts."""

    lines: tuple[Line, ...]
    receives: tuple[Recv, ...]
    split: frozenset[Key]


def script(ops: Sequence[Op]) -> Script:
    """Return the script of a rank's ops.

    >>> from evenflow.ir.op import Forward, Recv
    >>> arrival = Recv(source=0, target=1, microbatch=0, payload=Payload.ACTIVATION)
    >>> [len(line.takes) for line in script([arrival, Forward(1, 0)]).lines]
    [0, 1]
    """
    last = {key: at for at, op in enumerate(ops) for key in _touched(op)}
    ends: dict[int, list[Key]] = {}
    for key, at in last.items():
        ends.setdefault(at, []).append(key)
    posted: dict[tuple[int, int, Payload], list[Recv]] = {}
    lines = []
    for at, op in enumerate(ops):
        takes: list[Recv] = []
        for single in singles(op):
            if isinstance(single, Recv):
                posted.setdefault((single.target, single.microbatch, single.payload), []).append(single)
        for part in parts(op) if isinstance(op, ComputeOp) else ():
            payload = Payload.ACTIVATION if isinstance(part, Forward) else Payload.GRADIENT
            takes += posted.pop((part.stage, part.microbatch, payload), ())
        lines.append(Line(op, tuple(takes), tuple(ends.get(at, ()))))
    receives = tuple(single for op in ops for single in singles(op) if isinstance(single, Recv))
    computes = (part for op in ops if isinstance(op, ComputeOp) for part in parts(op))
    split = frozenset((part.stage, part.microbatch) for part in computes if isinstance(part, InputGrad))
    return Script(tuple(lines), receives, split)


def singles(op: Op) -> tuple[Op, ...]:
    """The transfers of a group, or the op itself."""
    return op.transfers if isinstance(op, Exchange) else (op,)


def _touched(op: Op) -> Iterator[Key]:
    """The (stage, microbatch) pairs of this rank that an op touches."""
    match op:
        case Exchange(transfers):
            for transfer in transfers:
                yield from _touched(transfer)
        case ReduceGrads() | Unshard():
            return
        case Send():
            yield op.source, op.microbatch
        case Recv():
            yield op.target, op.microbatch
        case Handoff():
            yield op.source, op.microbatch
            yield op.target, op.microbatch
        case _:
            for part in parts(op):
                yield part.stage, part.microbatch
