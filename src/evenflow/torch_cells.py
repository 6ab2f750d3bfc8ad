"""The cells of torch's schedule files: how `torch.distributed.pipelining` writes one action of one rank.

Read in `torch/distributed/pipelining/schedules.py` of torch 2.13 (`_Action.from_str` and `__repr__`). A
forward, a backward and its two halves are written as ours (`2F0`, `2B0`, `2I0`, `2W0`). What differs:

- two fused ops are `(2F3;5B1)OVERLAP_F_B`, a forward and a backward, where ours are `2F3&5B1`. torch reads as
  much of a cell as it knows, so it takes ours for `2F3` alone, and says nothing;
- what torch's own lowering adds is spelled `0SEND_F1`, `1RECV_B0`, `2UNSHARD`, `2RESHARD`, `2REDUCE_GRAD`;
- leading zeros are read there, and refused here.
"""

import re

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, SimpleOp, parse_op, parts

_FUSED = re.compile(r"\(([^();]+);([^();]+)\)OVERLAP_F_B")
_ADDED = re.compile(r"\d+(?:(?:SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)")


def torch_cell(op: ComputeOp) -> str:
    """Return an op as torch writes it, of two fused ones the forward first.

    Raises `ConfigError` for two fused ops that are no forward and backward: torch fuses no others.

    >>> from evenflow.ir.op import parse_op
    >>> torch_cell(parse_op("2I0")), torch_cell(parse_op("5B1&2F3"))
    ('2I0', '(2F3;5B1)OVERLAP_F_B')
    """
    if not isinstance(op, Overlap):
        return str(op)
    match sorted(parts(op), key=lambda part: not isinstance(part, Forward)):
        case [Forward() as first, (Backward() | InputGrad()) as second]:
            return f"({first};{second})OVERLAP_F_B"
    raise ConfigError(
        f"{op}: torch fuses a forward with a backward or an input gradient, and no other two ops"
    )


def parse_torch_fused(cell: str) -> Overlap | None:
    """Read two fused ops as torch writes them; None for any other text.

    >>> print(parse_torch_fused("(2F3;5B1)OVERLAP_F_B"), parse_torch_fused("2F3"))
    2F3&5B1 None
    """
    found = _FUSED.fullmatch(cell)
    if found is None:
        return None
    first, second = (_simple(part.strip()) for part in found.groups())
    return None if first is None or second is None else Overlap(first, second)


def _simple(text: str) -> SimpleOp | None:
    try:
        op = parse_op(text)
    except ConfigError:
        return None
    return op if isinstance(op, SimpleOp) else None


def is_added_by_torch(cell: str) -> bool:
    """Whether torch's lowering adds this to a schedule: a transfer, or what data ranks do together.

    >>> is_added_by_torch("0SEND_F1"), is_added_by_torch("2UNSHARD"), is_added_by_torch("2F0")
    (True, True, False)
    """
    return _ADDED.fullmatch(cell) is not None
