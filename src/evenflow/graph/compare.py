"""Two recordings of one program on one microbatch: where they differ, Python told the program something else.

A counter, a clock, a random number of Python's own: what would be frozen by one recording shows when the
program runs again.
"""

from collections.abc import Iterator
from typing import Any

from evenflow.graph.graph import FunctionTarget, Graph, Guard, ModuleTarget, Node
from evenflow.graph.outside import PLAIN
from evenflow.graph.template import Ref, Shared, Template
from evenflow.graph.tree import BufferSource


def find_difference(first: Graph, second: Graph) -> str:
    """What to say of the first step that differs between two recordings; nothing if none does."""
    mine, theirs = _Described(first), _Described(second)
    for step, other in zip(_steps(first), _steps(second), strict=False):
        before, after = mine.step(step), theirs.step(other)
        if before != after:
            name = "its result" if isinstance(step, Template) else step.name
            return (
                f"two runs of the program on one microbatch differ at {name}: {_difference(before, after)}; "
                "something outside of the batch changes with every call (a counter, a clock, a random number "
                "of Python's): keep it inside one module (atomic=[…]), or pass it in the batch"
            )
    return ""


def _steps(graph: Graph) -> Iterator[Node | Guard | Template]:
    yield from graph.nodes
    yield from graph.guards
    yield graph.output


class _Described:
    """A graph's steps as values to compare; its own values are numbered in order of appearance."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.numbers: dict[int, int] = {}

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
            case Ref(value):
                source = self.graph.values[value].source
                if isinstance(source, BufferSource):
                    constant = self.graph.constants.get(source.name)
                    return ("a tensor of Python's", id(constant)) if constant is not None else source
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
