"""Two recordings of one program on one microbatch: where they differ, Python told the program something else.

A counter, a clock, a random number of Python's own: what would be frozen by one recording shows when the program
runs again.
"""

from collections.abc import Iterator
from typing import Any

from evenflow.errors import RecordError
from evenflow.graph.graph import FunctionTarget, Graph, Guard, ModuleTarget, Node
from evenflow.graph.outside import PLAIN
from evenflow.graph.template import Ref, Shared, Template


def refuse_difference(first: Graph, second: Graph) -> None:
    """Raise `RecordError` naming the first step that differs between two recordings."""
    numbers: tuple[dict[int, int], dict[int, int]] = ({}, {})
    steps = zip(_steps(first), _steps(second), strict=False)
    for mine, theirs in steps:
        before, after = _described(mine, numbers[0]), _described(theirs, numbers[1])
        if before != after:
            name = "its result" if isinstance(mine, Template) else mine.name
            raise RecordError(
                f"two runs of the program on one microbatch differ at {name}: {_difference(before, after)}; "
                "something outside of the batch changes with every call (a counter, a clock, a random number "
                "of Python's): keep it inside one module (atomic=[…]), or pass it in the batch"
            )


def _steps(graph: Graph) -> Iterator[Node | Guard | Template]:
    yield from graph.nodes
    yield from graph.guards
    yield graph.output


def _described(step: Node | Guard | Template, numbers: dict[int, int]) -> tuple[Any, ...]:
    """What a step is, its values numbered in order of appearance."""
    match step:
        case Node():
            target: tuple[Any, ...]
            match step.target:
                case ModuleTarget(path, call, draws):
                    target = (path, call, draws)
                case FunctionTarget(_, draw):
                    target = (draw,)
            modes = (step.grad_enabled, step.autocast, step.changed_buffers, len(step.rebinds))
            return step.name, *target, *_tree(step.args, numbers), *_tree(step.output, numbers), *modes
        case Guard():
            return step.name, *_tree(step.args, numbers), repr(step.result)
        case Template():
            return _tree(step, numbers)


def _tree(template: Template, numbers: dict[int, int]) -> tuple[Any, ...]:
    return template.spec, *(_leaf(leaf, numbers) for leaf in template.leaves)


def _leaf(leaf: Any, numbers: dict[int, int]) -> Any:  # any leaf of a template
    match leaf:
        case Ref(value):
            return Ref(numbers.setdefault(value, len(numbers)))
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
