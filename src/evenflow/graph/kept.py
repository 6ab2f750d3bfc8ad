"""Buffers that a program changes and that autograd may keep for the backward.

Autograd keeps the tensor itself, not its numbers. In a plain loop the backward of a microbatch follows its
forward, and finds them; in a pipeline the next microbatch's forward has changed them by then.
"""

from collections import defaultdict
from collections.abc import Iterator

from evenflow.graph.tree import BufferSource, Call, CallTree, FunctionCall, ModuleCall, walk


class KeptBuffers:
    """Asks of each call of a recorded run which changed buffers its backward may look at."""

    def __init__(self, tree: CallTree) -> None:
        self._values = tree.values
        functions = (call for call in walk(tree.root) if isinstance(call, FunctionCall))
        self._changed = {name for call in functions for name in call.changed_buffers}
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
                inside = f"{call.path}." if call.path else ""
                yield from (name for name in sorted(self._changed) if name.startswith(inside))
