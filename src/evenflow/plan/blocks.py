"""Blocks: the elements of a model's lists of modules, found by the names of nodes.

Nodes in a row that are computed again in the backward are computed again together where they belong to one
block, so that they keep nothing but what the block is given; where they do not, each by itself. All in one
would keep the least between forward and backward, and all that they save at once during it.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise


def block_of(name: str) -> str | None:
    """The block that a node belongs to: its module's path up to the first number; None where there is none.

    >>> block_of("decoder.layers.3.mlp.0"), block_of("decoder.layers.3:add"), block_of("decoder.norm")
    ('decoder.layers.3', 'decoder.layers.3', None)
    """
    parts = name.partition(":")[0].split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: at + 1])
    return None


def regions_of(names: Sequence[str], nodes: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """What is computed again together: those of these nodes, ascending, that stand in a row in one block.

    >>> regions_of(["in", "h.0.a", "h.0.b", "h.0.c", "h.1.a", "out"], {0, 1, 2, 4, 5})
    ((0,), (1, 2), (4,), (5,))
    """
    found: list[list[int]] = []
    order = sorted(nodes)
    for before, node in pairwise((None, *order)):
        assert node is not None, "only the first has none before it"
        block = block_of(names[node])
        together = before == node - 1 and block is not None and block == block_of(names[before])
        if together:
            found[-1].append(node)
        else:
            found.append([node])
    return tuple(map(tuple, found))
