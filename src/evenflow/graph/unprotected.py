"""Buffers that a program changes, and that a backward reads where no copy can be handed to it.

A plain loop's backward follows its forward, and finds buffers as that left them. In a pipeline the next
microbatch's forward has changed them by then. What autograd keeps is copied (`runtime/kept.py`), and so is
what is read after the last change (`snapshots`); what a gradient checkpoint reads again, and what a custom
function keeps in attributes of its context, is the buffer itself.
"""

from collections.abc import Iterable, Sequence
from types import MethodType

from evenflow.errors import RecordError
from evenflow.graph.graph import FunctionTarget, Node
from evenflow.graph.kept import KeptBuffers
from evenflow.graph.settings import bare
from evenflow.graph.tree import BufferSource, Call, FunctionCall, ModuleCall, Value, walk

_LATER = "in a pipeline the next microbatch's forward comes before this one's backward"


def refuse_unprotected(
    calls: Iterable[Call], nodes: Sequence[Node], values: Sequence[Value], kept: KeptBuffers
) -> None:
    """Raise `RecordError` naming the first such buffer. `nodes` have the copies among them already."""
    changed = {name for node in nodes for name in node.changed_buffers}
    if not changed:
        return
    sources = ((value.source, value.storage) for value in values)
    names = {storage: each.name for each, storage in sources if isinstance(each, BufferSource)}
    for node in nodes:
        taken = (names.get(values[ref].storage) for ref in node.args.refs)
        read = (changed.intersection((*node.buffers, *taken))) - set(node.changed_buffers)
        if read and node.region is not None:
            raise _read_again(min(read))
        if read and node.grad_enabled and isinstance(node.target, FunctionTarget) and _is_custom(node.target):
            raise _kept_by(node.name, min(read))
    for call in (call for call in calls if isinstance(call, ModuleCall)):
        for inner in walk(call):
            held = kept.by(inner)
            match inner:
                case ModuleCall(recomputes=True) if held:
                    raise _read_again(held[0])
                case FunctionCall(function=function) if held and isinstance(bare(function), MethodType):
                    raise _kept_by(inner.name, held[0])


def _is_custom(target: FunctionTarget) -> bool:
    return isinstance(bare(target.function), MethodType)


def _read_again(name: str) -> RecordError:
    return RecordError(
        f"a gradient checkpoint in the program reads the buffer {name}, which the program changes: its "
        f"recomputation would find other numbers, for {_LATER}; make a clone() of it before the checkpoint, "
        "and hand that in"
    )


def _kept_by(function: str, name: str) -> RecordError:
    return RecordError(
        f"{function} is given the buffer {name}, which the program changes, and its backward may look at it: "
        f"{_LATER}; give it a clone() of the buffer"
    )
