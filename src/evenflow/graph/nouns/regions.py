"""Checkpoint regions (`torch.utils.checkpoint`): what must not be changed in them, for they run again.

State must not: a plain loop recomputes a microbatch before the next one's forward, a pipeline after it, so
buffers and attributes would be changed in another order, and what is read of them would be something else.

And no part what another part made: a stage runs its part of a region as a checkpoint of its own, and one for
each stretch with and without autocast. What it changes in place, its recomputation would change twice.
"""

import itertools
from collections.abc import Sequence

from evenflow.errors import RecordError
from evenflow.graph.nouns.graph import Node
from evenflow.graph.nouns.tree import CallTree, FunctionCall, ModuleCall, Value, walk


def _changes_state(what: str) -> RecordError:
    """What to raise where a checkpoint changes a buffer or an attribute."""
    return RecordError(
        f"a gradient checkpoint in the program changes {what}: a recomputation changes it once more, and in "
        "a pipeline after the forwards of other microbatches: leave the module that does so out of the "
        "checkpoint, or switch its changes off (eval() of a BatchNorm)"
    )


def refuse_changes_of_state(tree: CallTree) -> None:
    """Raise `RecordError` naming the first buffer or attribute that is changed inside a checkpoint."""
    for call in walk(tree.root):
        match call:
            case FunctionCall(region=int(), changed_buffers=(name, *_)):
                raise _changes_state(f"the buffer {name}")
            case ModuleCall(region=int(), changed=(name, *_)) | ModuleCall(recomputed=(name, *_)):
                raise _changes_state(name)


def refuse_changes_across_autocast(nodes: Sequence[Node], values: Sequence[Value]) -> None:
    """Refuse a change in place, inside a region, of what the region made where autocast was not the same."""
    parts = itertools.groupby(nodes, key=lambda node: (node.region, bool(node.autocast)))
    first: dict[tuple[int, int], int] = {}  # region and memory -> the part that touched it first
    for number, ((region, _), inside) in enumerate(parts):
        for node in inside if region is not None else ():
            for storage in memory_of(node, values):
                first.setdefault((region, storage), number)
            for old, _new in node.rebinds:
                if first[region, values[old].storage] != number:
                    raise RecordError(
                        f"{node.name} changes a tensor {values[old].info} in place inside a checkpoint that "
                        "enters or leaves autocast on the way: each part is computed again by itself, and "
                        "would change it twice; enter autocast around the checkpoint, or change a clone()"
                    )


def first_in_region(nodes: Sequence[Node], values: Sequence[Value], at: int, storage: int) -> int:
    """Where the region of node `at` first makes or uses a memory."""
    region = nodes[at].region
    return next(
        place
        for place, node in enumerate(nodes)
        if node.region == region and storage in memory_of(node, values)
    )


def memory_of(node: Node, values: Sequence[Value]) -> set[int]:
    """The memory that a node uses or makes."""
    return {values[value].storage for value in (*node.inputs, *node.makes)}
