"""Buffers that the program changes, and reads once more: what a later reader gets is a copy.

A microbatch reads a buffer as it left it, but the next one changes it before this one's last stage has run,
and before its backward has. So the buffer is copied right after its last change, and all that names it from
there on, the program's result too, takes the copy: an activation like any other, which a cut may part from
the buffer. The copy lies in memory as the buffer does, for kernels may add in another order otherwise.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.graph.nouns.graph import FunctionTarget, Node
from evenflow.graph.nouns.template import Ref, Shell, Template
from evenflow.graph.nouns.tree import BufferSource, CallSource, Value


def with_snapshots(
    nodes: Sequence[Node], values: Sequence[Value], output: Template
) -> tuple[list[Node], tuple[Value, ...], Template]:
    """The nodes with copies of changed buffers among them, the values with theirs, the program's result."""
    found, known = list(nodes), list(values)
    last = {name: at for at, node in enumerate(nodes) for name in node.changed_buffers}
    numbers = {v.source.name: v.number for v in values if isinstance(v.source, BufferSource)}
    shells = (leaf for leaf in output.leaves if isinstance(leaf, Shell))
    inside = {ref.value for shell in shells for ref in shell.refs}
    for name in (name for name, number in numbers.items() if number in inside):
        last.setdefault(name, len(nodes) - 1)  # objects are filled with values alone
    for name, at in sorted(last.items(), key=lambda pair: -pair[1]):  # the last first: places stay right
        buffer = numbers.get(name)
        if buffer is None or not (
            buffer in output.refs or any(buffer in node.args.refs for node in found[at + 1 :])
        ):
            continue
        made = len(known)
        known.append(dataclasses.replace(known[buffer], number=made, source=CallSource(), storage=-1 - made))
        later = [_reading(node, name, buffer, made) for node in found[at + 1 :]]
        _follow(later, known, buffer, made)
        output = _renamed(output, buffer, made)
        found[at + 1 :] = [_snapshot(found[at], name, buffer, made), *later]
    return found, tuple(known), output


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, over memory of its own.

    >>> copy_of(torch.ones(4, 4)[:, :2]).stride()
    (4, 1)
    """
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return tensor.clone()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in pairs)
    flat = tensor.as_strided((length,), (1,), tensor.storage_offset())
    return flat.clone().as_strided(tensor.shape, tensor.stride(), 0)


def _snapshot(after: Node, name: str, buffer: int, made: int) -> Node:
    args, args_spec = pytree.tree_flatten(((Ref(buffer),), {}))
    output, output_spec = pytree.tree_flatten(Ref(made))
    return dataclasses.replace(
        after,
        name=f"{name} (copied)",
        target=FunctionTarget(copy_of, None),
        args=Template(tuple(args), args_spec),
        output=Template(tuple(output), output_spec),
        results=(made,),
        rebinds=(),
        parameters=(),
        buffers=(name,),
        changed_buffers=(),
        kept_buffers=(),
        flops=0,
        whole=None,
        stateful=False,
        opaque=False,
        steps=(),
    )


def _reading(node: Node, name: str, buffer: int, made: int) -> Node:
    """A later node, which is handed the copy; a function then has nothing to do with the buffer."""
    if buffer not in node.args.refs:
        return node
    node = dataclasses.replace(node, args=_renamed(node.args, buffer, made))
    if not isinstance(node.target, FunctionTarget):
        return node
    buffers, kept = (
        tuple(each for each in names if each != name) for names in (node.buffers, node.kept_buffers)
    )
    return dataclasses.replace(node, buffers=buffers, kept_buffers=kept)


def _follow(nodes: Sequence[Node], values: list[Value], buffer: int, made: int) -> None:
    """Views that later nodes take of the copy lie in its memory, not in the buffer's."""
    before, after = values[buffer].storage, values[made].storage
    moved = {made}
    for node in nodes:
        inside = [value for value in node.inputs if values[value].storage in (before, after)]
        if inside and moved.issuperset(inside):
            for value in node.makes:
                if values[value].storage == before:
                    values[value] = dataclasses.replace(values[value], storage=after)
                    moved.add(value)


def _renamed(template: Template, old: int, new: int) -> Template:
    def change(leaf: Any) -> Any:  # any leaf of a template
        if isinstance(leaf, Shell):
            return leaf.renamed(old, new)
        return Ref(new) if leaf == Ref(old) else leaf

    return template.rewrite(change)
