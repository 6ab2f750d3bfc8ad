"""Checkpoint regions whose parts are computed again one by one: what must not be changed across parts.

A stage runs its part of a region as a checkpoint of its own, and one for each stretch with and without
autocast. What one part changes in place of another's, its recomputation would change twice.
"""

import itertools
from collections.abc import Sequence

from evenflow.errors import RecordError
from evenflow.graph.graph import Node
from evenflow.graph.tree import Value


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
