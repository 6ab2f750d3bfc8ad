"""Straight-line Python for calls in a row: what a program would look like if its author had unrolled it.

A table of calls that is interpreted costs some microseconds a call, as much as a small kernel; so a function
is written once, with values as local variables, and compiled. For a block it reads like

    def run(values, shared):
        v12 = values.pop(12)
        with mode_0():
            v14 = layers_0_norm1(v12)
            v17 = layers_0_attention(v14, mask=c_3)
            del v14
        values[17] = v17

Tracebacks show its lines. A value is let go of (`del`) after its last use.
"""

import hashlib
import keyword
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.graph.nouns.graph import Node
from evenflow.graph.nouns.template import Ref, Shared, Shell, Template
from evenflow.runtime.program.call import Around, Call

# Takes what `takes` names out of the values and puts what `gives` names there; (values, shared objects).
Straight = Callable[[dict[int, Any], dict[int, Any]], Any]  # (what it returns is of no use)
# Is told a node that has run and the values that it took and made.
Tell = Callable[[Node, Mapping[int, Any]], None]


def straight(
    groups: Sequence[tuple[Around, Sequence[Call]]],
    *,
    takes: Iterable[int],
    last: Set[int],
    gives: Iterable[int],
    tell: Tell | None = None,
) -> Straight:
    """The function that makes these calls, each group inside its context.

    `takes` are the values that it finds, `last` those of them that nobody needs afterwards, `gives` those
    that it leaves. `tell` is told of every node that has run.
    """
    calls = [call for _, group in groups for call in group]
    writer = _Writer(_last_uses(calls, set(takes) - last, set(gives)), tell)
    for value in takes:
        writer.take(value, "values.pop({})" if value in last else "values[{}]")
    for mode, group in groups:
        writer.within([writer.name("mode", mode)], [line for call in group for line in writer.call(call)])
    for value in gives:
        writer.line(f"values[{value}] = v{value}")
    return writer.compiled()


def filling(template: Template) -> Callable[[dict[int, Any]], Any]:
    """The function that fills a template with values and with copies of the tensors that it holds already.

    >>> filling(Template.of_values([7, 7]))({7: 1})
    [1, 1]
    """
    writer = _Writer([], None)
    for value in dict.fromkeys(template.refs):
        writer.take(value, "values[{}]")
    copied = template.rewrite(lambda leaf: _Copied(leaf) if isinstance(leaf, torch.Tensor) else leaf)
    writer.line(f"return {writer.tree(list(copied.leaves), copied.spec)}")
    run = writer.compiled()
    return lambda values: run(values, {})


@dataclass(frozen=True, slots=True)
class _Copied:
    """Stands for a copy of a tensor, such as a buffer that may change afterwards."""

    tensor: torch.Tensor


def _last_uses(calls: Sequence[Call], held: set[int], gives: set[int]) -> list[list[int]]:
    """For each call the values that nobody needs after it."""
    seen = held | gives
    drops: list[list[int]] = []
    for call in reversed(calls):
        used = dict.fromkeys((*call.takes, *call.node.makes))
        drops.append([value for value in used if value not in seen])
        seen.update(used)
    return drops[::-1]


class _Writer:
    """A function that is being written, and the objects that it names."""

    def __init__(self, drops: list[list[int]], tell: Tell | None) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}  # objects of any type
        self.alive: set[int] = set()  # values that are local variables now
        self.drops, self.tell = iter(drops), tell

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def take(self, value: int, place: str) -> None:
        self.line(f"v{value} = {place.format(value)}")
        self.alive.add(value)

    def within(self, contexts: Sequence[str], lines: Iterable[str]) -> None:
        self.lines += [f"    {line}" for line in _within(contexts, lines)]

    def name(self, hint: str, thing: Any) -> str:  # any object
        """A name for an object, after what it is."""
        word = re.sub(r"[^A-Za-z0-9_]", "_", hint)
        found = f"{'_' * word[:1].isdigit()}{word}_{len(self.names)}"
        self.names[found] = thing
        return found

    def compiled(self) -> Straight:
        text = "\n".join(("def run(values, shared):", *self.lines, ""))
        file = f"evenflow/{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
        names = {**self.names, "__name__": file, "__loader__": _Source(text)}
        exec(compile(text, file, "exec"), names)
        run: Straight = names["run"]
        return run

    def call(self, call: Call) -> list[str]:
        """The lines of one call, and of what is to be done before and after it."""
        node = call.node
        refs = [leaf.value if isinstance(leaf, Ref) else None for leaf in node.output.leaves]
        results = [value if value in node.results else None for value in refs]
        checked = node.opaque or node.stateful
        made = f"{self.name(node.name, call.function)}({', '.join(self.arguments(call))})"
        lines = [f"{self.name('before', call.before)}()"] if call.before is not None else []
        lines.append(f"result = {made}" if checked else self.assigned(results, node.output.spec, made))
        if call.around:
            lines = _within([self.name("around", context) for context in call.around], lines)
        if checked:
            given = self.mapping(value for value in refs if value is not None)
            lines.append(f"{self.name('check', call.check)}(result, {given})")
            lines.append(self.assigned(results, node.output.spec, "result"))
        lines += [f"v{new} = v{old}" for old, new in node.rebinds]
        self.alive.update(node.makes)
        if self.tell is not None:
            told = f"{self.name('node', node)}, {self.mapping((*call.takes, *node.makes))}"
            lines.append(f"{self.name('tell', self.tell)}({told})")
        dropped = [value for value in next(self.drops) if value in self.alive]
        self.alive.difference_update(dropped)
        names = [f"v{value}" for value in dropped] + ["result"] * checked
        return [*lines, f"del {', '.join(names)}"] if names else lines

    def assigned(self, values: Sequence[int | None], spec: pytree.TreeSpec, made: str) -> str:
        """A line that gives the values in a result their names; what has none is let go of."""
        if all(value is None for value in values):
            return made
        if spec.is_leaf():
            return f"v{values[0]} = {made}"
        flat = all(spec.child(at).is_leaf() for at in range(spec.num_children))
        if spec.type not in (tuple, list) or not flat:
            made = f"{self.name('leaves', pytree.tree_leaves)}({made})"
        names = ["_" if value is None else f"v{value}" for value in values]
        return f"{', '.join(names)}, = {made}{'; del _' * ('_' in names)}"

    def mapping(self, values: Iterable[int]) -> str:
        """Those of the values that are there, by number."""
        there = dict.fromkeys(value for value in values if value in self.alive)
        return "{" + ", ".join(f"{value}: v{value}" for value in there) + "}"

    def arguments(self, call: Call) -> list[str]:
        """A call's arguments as text."""
        leaves = list(call.args.leaves)
        positional, keywords = (call.args.spec.child(at) for at in range(2))
        found = [self.tree(leaves, positional.child(at)) for at in range(positional.num_children)]
        named = [(name, self.tree(leaves, keywords.child(at))) for at, name in enumerate(keywords.context)]
        if all(name.isidentifier() and not keyword.iskeyword(name) for name, _ in named):
            return [*found, *(f"{name}={text}" for name, text in named)]
        return [*found, "**{" + ", ".join(f"{name!r}: {text}" for name, text in named) + "}"]

    def tree(self, leaves: list[Any], spec: pytree.TreeSpec) -> str:
        """A tree as text, made anew with each call if it can be changed; takes its leaves off the front."""
        if spec.is_leaf():
            return self.leaf(leaves.pop(0))
        keys = spec.context if spec.type is dict else ()
        if spec.type not in (tuple, list, dict) or any(type(key) not in (str, int) for key in keys):
            flat = [self.leaf(leaves.pop(0)) for _ in range(spec.num_leaves)]
            return f"{self.name('unflatten', spec.unflatten)}([{', '.join(flat)}])"
        parts = [self.tree(leaves, spec.child(at)) for at in range(spec.num_children)]
        if spec.type is tuple:
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        if spec.type is list:
            return f"[{', '.join(parts)}]"
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(keys, parts, strict=True)) + "}"

    def leaf(self, leaf: Any) -> str:  # any leaf of a template
        """A leaf as text: a variable, a number as it is written, or the name of an object."""
        match leaf:
            case Ref(value):
                return f"v{value}"
            case _Copied(tensor):
                return f"{self.name('copy', tensor.clone)}()"
            case Shared():
                return f"{self.name('shared', leaf.among)}(shared)"
            case Shell():
                return f"{self.name('filled', leaf.filled)}({self.mapping(ref.value for ref in leaf.refs)})"
            case None:
                return "None"
            case _ if type(leaf) in (bool, int, str) or (type(leaf) is float and math.isfinite(leaf)):
                return repr(leaf)
            case _:
                return self.name("constant", leaf)


def _within(contexts: Sequence[str], lines: Iterable[str]) -> list[str]:
    entered = ", ".join(f"{context}()" for context in contexts)
    return [f"with {entered}:", *(f"    {line}" for line in lines)]


class _Source:
    """What `linecache` asks for the lines of a traceback."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, _: str) -> str:
        """The text of the function."""
        return self.text
