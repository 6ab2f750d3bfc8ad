"""Two recordings of one program on one microbatch: where they differ, Python told the program something else.

A counter, a clock, a random number of Python's own: what would be frozen by one recording shows when the
program runs again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evenflow.graph.nouns.graph import FunctionTarget, Graph, Guard, ModuleTarget, Node
from evenflow.graph.nouns.template import Ref, Shared, Template
from evenflow.graph.nouns.tree import BufferSource, CallTree, FunctionCall, Value, functions_in, modules_in
from evenflow.graph.python.reach import PLAIN


def find_difference(first: Graph, second: Graph) -> str:
    """What to say of the first step that differs between two recordings; nothing if none does."""
    mine, theirs = (_Described(graph.values, _pure_outside_leaves(graph)) for graph in (first, second))
    for step, other in zip(_steps(first, mine), _steps(second, theirs), strict=False):
        before, after = mine.step(step), theirs.step(other)
        if before != after:
            name = "its result" if isinstance(step, Template) else step.name
            kept = _whole_in_one(step, other) or _whole_in_one(other, step)
            if kept is not None:
                return (
                    f"{kept.name} does something else when it runs again: in one of two runs it is one node, "
                    f"because {kept.whole}. What a module makes in one call and uses in the next (a table, a "
                    "mask) must be there before: make it in __init__, as a buffer"
                )
            return (
                f"two runs of the program on one microbatch differ at {name}: {_difference(before, after)}; "
                "something outside of the batch changes with every call (a counter, a clock, a random number "
                "of Python's): keep it inside one module (atomic=[…]), or pass it in the batch"
            )
    return ""


def _whole_in_one(step: Node | Guard | Template, other: Node | Guard | Template) -> Node | None:
    """The first of two steps if it is a module that stays whole for a reason, and the second is inside it."""
    match step, other:
        case Node(target=ModuleTarget(path), whole=str()), Node(name=name) if name != step.name:
            return step if name.startswith(path) else None
    return None


def _pure_outside_leaves(graph: Graph) -> dict[int, Any]:
    """What Python alone decides, without leaves, which may change their minds, and what follows from them."""
    pure = {value: numbers for value, numbers in graph.pure.items() if value not in graph.maker}
    for node in graph.nodes:
        if isinstance(node.target, FunctionTarget) and all(value in pure for value in node.inputs):
            pure |= {value: graph.pure[value] for value in node.makes if value in graph.pure}
    return pure


def same_functions(first: CallTree, second: CallTree) -> bool:
    """Whether two runs called the same functions on the same values, whatever else Python did."""
    found = []
    for tree in (first, second):
        describe = _Described(tree.values, tree.pure)
        calls = functions_in(tree.root)
        found.append([describe.call(call) for call in calls if not describe.is_pure(call)])
    return found[0] == found[1]


def forget_changes(tree: CallTree, names: frozenset[str]) -> None:
    """Let modules be taken apart that changed only these attributes, which proved not to matter."""
    for call in modules_in(tree.root):
        if call.changed and names.issuperset(call.changed):
            call.whole, call.stateful, call.changed = call.whole_besides, False, ()


def keep_whole_alike(first: CallTree, second: CallTree) -> None:
    """Keep whole in a second run what changed its own state in the first, though it did not do so again."""
    reasons = {call.path: call.whole for call in modules_in(first.root) if call.stateful}
    for call in modules_in(second.root):
        if call.path in reasons:
            call.whole, call.stateful = call.whole or reasons[call.path], True


def _steps(graph: Graph, describe: "_Described") -> Iterator[Node | Guard | Template]:
    yield from (node for node in graph.nodes if not describe.is_pure(node))
    yield from graph.guards
    yield graph.output


class _Described:
    """A recording's steps as values to compare; its own values are numbered in order of appearance."""

    def __init__(self, values: Sequence[Value], pure: Mapping[int, Any]) -> None:
        self.values, self.pure = values, pure
        self.numbers: dict[int, int] = {}

    def is_pure(self, step: Node | FunctionCall) -> bool:
        """Whether a step makes nothing but what Python decides, which a cache may keep: its numbers count."""
        made = (*step.output.refs, *(new for _, new in step.rebinds))
        return bool(made) and all(value in self.pure for value in made)

    def call(self, call: FunctionCall) -> tuple[Any, ...]:
        modes = (call.grad_enabled, call.autocast, call.changed_buffers, len(call.rebinds), call.draws)
        return call.name, call.path, *self.tree(call.args), *self.tree(call.output), *modes

    def step(self, step: Node | Guard | Template) -> tuple[Any, ...]:
        match step:
            case Node():
                target: tuple[Any, ...]
                match step.target:
                    case ModuleTarget(path, call, draws):
                        target = (path, call, draws)
                    case FunctionTarget(_, draw):
                        target = (draw,)
                modes = (step.grad_enabled, step.autocast, step.changed_buffers, len(step.rebinds))
                return step.name, *target, *self.tree(step.args), *self.tree(step.output), *modes
            case Guard():
                return step.name, *self.tree(step.args), repr(step.result)
            case Template():
                return self.tree(step)

    def tree(self, template: Template) -> tuple[Any, ...]:
        return template.spec, *map(self.leaf, template.leaves)

    def leaf(self, leaf: Any) -> Any:  # any leaf of a template
        match leaf:
            case Ref(value) if value in self.pure:
                return "a constant", self.pure[value]
            case Ref(value) if isinstance(self.values[value].source, BufferSource):
                return self.values[value].source
            case Ref(value):
                return Ref(self.numbers.setdefault(value, len(self.numbers)))
            case Shared(number):
                return "object", number
            case _ if isinstance(leaf, PLAIN):
                return type(leaf), repr(leaf)
            case slice():
                return repr(leaf)
            case _:
                return type(leaf)


def _difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    for mine, theirs in zip(before, after, strict=False):
        if mine != theirs:
            return f"{_shown(mine)}, then {_shown(theirs)}"
    return f"{len(before)} arguments, then {len(after)}"


def _shown(part: Any) -> str:
    return part[1] if isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], str) else str(part)
