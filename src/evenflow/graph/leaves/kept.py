"""Buffers that a program changes and that autograd may keep for the backward.

Autograd keeps the tensor itself, not its numbers. In a plain loop the backward of a microbatch follows its
forward, and finds them; in a pipeline the next microbatch's forward has changed them by then. What autograd
keeps is copied (`runtime/program/kept.py`), and so is what is read after the last change (`snapshots`); what
a gradient checkpoint reads again, and what a custom function keeps in attributes of its context, is the
buffer itself, and refused.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from types import MethodType

from evenflow.errors import RecordError
from evenflow.graph.kernels.settings import bare
from evenflow.graph.nouns.graph import FunctionTarget, Node, changed_buffers
from evenflow.graph.nouns.tree import (
    BufferSource,
    Call,
    CallTree,
    FunctionCall,
    ModuleCall,
    Value,
    functions_in,
    walk,
)

_LATER = "in a pipeline the next microbatch's forward comes before this one's backward"


class KeptBuffers:
    """Asks of each call of a recorded run which changed buffers its backward may look at."""

    def __init__(self, tree: CallTree) -> None:
        self._values = tree.values
        self._changed = {name for call in functions_in(tree.root) for name in call.changed_buffers}
        self._names: defaultdict[int, list[str]] = defaultdict(list)  # by memory
        for value in tree.values:
            if isinstance(value.source, BufferSource) and value.source.name in self._changed:
                self._names[value.storage].append(value.source.name)

    def by(self, call: Call) -> tuple[str, ...]:
        """The changed buffers, by name, that a call may keep; none where it changes none."""
        inside = walk(call) if self._changed else ()
        return tuple(dict.fromkeys(name for inner in inside for name in self._by_one(inner)))

    def _by_one(self, call: Call) -> Iterator[str]:
        match call:
            case FunctionCall(grad_enabled=True):
                if any(self._values[ref].info.requires_grad for ref in call.output.refs):
                    taken = (
                        name for ref in call.args.refs for name in self._names[self._values[ref].storage]
                    )
                    # What it changes itself are running statistics, which its backward does without.
                    yield from (name for name in taken if name not in call.changed_buffers)
            case ModuleCall() if call.unseen or call.real:
                yield from (name for name in sorted(self._changed) if name.startswith(call.inside))


def refuse_unprotected(
    calls: Iterable[Call], nodes: Sequence[Node], values: Sequence[Value], kept: KeptBuffers
) -> None:
    """Raise `RecordError` naming the first changed buffer that a backward reads and no copy can stand in for.

    `nodes` have the copies of `snapshots` among them already.
    """
    changed = changed_buffers(nodes)
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
