"""Tensors of two microbatches in one memory: the first must not change what the second will read.

Each microbatch works on copies of what it changes in place, so the second would not see the change.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.nouns.graph import Graph
from evenflow.runtime.recorded.microbatch import tensors

# (microbatch, place of its tensor, a later microbatch): the later one has a tensor in that one's memory.
Overlap = tuple[int, int, int]


def overlaps(items: Sequence[Any]) -> tuple[Overlap, ...]:
    """Tensors that lie in the memory of a later microbatch's.

    >>> x = torch.zeros(2)
    >>> overlaps([{"x": x}, {"x": x}]), overlaps([{"x": x[:1]}, {"x": x[1:]}])
    (((0, 0, 1),), ())
    """
    by_memory: defaultdict[int, list[tuple[int, int, torch.Tensor]]] = defaultdict(list)
    for number, item in enumerate(items):
        for place, tensor in enumerate(tensors(item)):
            by_memory[storage_of(tensor)].append((number, place, tensor))
    found: list[Overlap] = []
    for given in by_memory.values():
        given.sort(key=lambda each: _extent(each[2])[0])
        open_ones: list[tuple[int, int, torch.Tensor]] = []  # those that reach to the next one's start
        for number, place, tensor in given:
            start, _ = _extent(tensor)
            open_ones = [each for each in open_ones if _extent(each[2])[1] > start]
            for other_number, other_place, other in open_ones:
                if number != other_number and _share(tensor, other):
                    pairs = sorted([(number, place), (other_number, other_place)])
                    found.append((*pairs[0], pairs[1][0]))
            open_ones.append((number, place, tensor))
    return tuple(sorted(found))


def refuse_changes_between(found: Sequence[Overlap], graphs: Sequence[Graph]) -> None:
    """Refuse that a microbatch changes what a later one reads; `graphs` are those of the microbatches."""
    for number, place, later in found:
        if place in graphs[number].changed_leaves:
            raise ConfigError(
                f"the program changes tensor number {place} of microbatch {number} in place, and microbatch "
                f"{later} has a tensor in the same memory, which would not see the change: each microbatch "
                "works on a copy; pass a clone() in one of them, or do not change it in place"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its memory, and the one behind its last."""
    if tensor.layout != torch.strided:
        return 0, 1
    start = int(tensor.storage_offset()) * tensor.element_size()
    if not tensor.numel():
        return start, start
    length = 1 + sum(
        (size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + length * tensor.element_size()


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, whose extents in one memory meet, have an element in common."""
    if one.layout != torch.strided or one.element_size() != other.element_size():
        return True
    forms = [(each.storage_offset(), each.shape, each.stride()) for each in (one, other)]
    if forms[0] == forms[1] or (one.is_contiguous() and other.is_contiguous()):
        return True
    places = torch.arange(max(_extent(each)[1] for each in (one, other)) // one.element_size())
    mine, theirs = (
        places.as_strided(each.shape, each.stride(), each.storage_offset()).reshape(-1)
        for each in (one, other)
    )
    return bool(torch.isin(mine, theirs).any())
