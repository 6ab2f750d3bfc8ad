"""Microbatches: splitting a batch into them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError

# Under this name Hugging Face's models are told how many tokens the whole batch has: the loss is then a sum.
GIVEN_COUNT = "num_items_in_batch"


@dataclass(frozen=True, slots=True)
class Microbatches:
    """A batch that is already split: a list of microbatches, each any tree. Pass it to `Pipeline.step`.

    >>> len(Microbatches([{"x": torch.zeros(2)}, {"x": torch.ones(2)}]).items)
    2
    """

    items: Sequence[Any]


def batch_size(batch: Any) -> int:
    """Rows of a batch: the common length of dim 0 of its tensors. 0-dimensional tensors don't count.

    Raises `ConfigError` naming the tensors that disagree.
    """
    known: set[int] = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if _has_rows(leaf)}
    if len(known) == 1:
        return known.pop()
    lengths: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if _has_rows(leaf):
            lengths.setdefault(leaf.shape[0], pytree.keystr(path) or "the batch")
    if not lengths:
        raise ConfigError(
            "the batch holds no tensor with a dimension to split; give split_batch=, or pass "
            "evenflow.Microbatches([…])"
        )
    found = ", ".join(f"{name} has {length}" for length, name in lengths.items())
    raise ConfigError(
        f"the batch's tensors disagree in dim 0, along which it is split: {found}; "
        "give split_batch=, or pass evenflow.Microbatches([…])"
    )


def tensors(microbatch: Any) -> list[torch.Tensor]:
    """The tensor leaves of a microbatch, in order."""
    return [leaf for leaf in pytree.tree_leaves(microbatch) if isinstance(leaf, torch.Tensor)]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def count(
    size: int,
    *,
    num_microbatches: int | None,
    microbatch_size: int | None,
    num_ranks: int,
    num_replicas: int = 1,
) -> int:
    """How many microbatches a batch of `size` rows makes, for all replicas of a pipeline together.

    By default the largest divisor of `size` up to four per rank: enough that the bubble is small; if there is
    one, a multiple of the replicas. A batch of fewer rows than `num_microbatches` makes one microbatch of
    each row.

    >>> count(24, num_microbatches=None, microbatch_size=None, num_ranks=2, num_replicas=4)
    24
    """
    if num_microbatches is not None and microbatch_size is not None:
        raise ConfigError("num_microbatches and microbatch_size say the same thing twice; give one of them")
    for name, number in (("num_microbatches", num_microbatches), ("microbatch_size", microbatch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}={number} must be at least 1")
    if microbatch_size is not None:
        return math.ceil(size / microbatch_size)
    if num_microbatches is None:
        fitting = [n for n in range(1, 4 * num_ranks * num_replicas + 1) if size % n == 0]
        return max(fitting, key=lambda n: (n % num_replicas == 0, n))
    return min(num_microbatches, size)


def bounds(size: int, num: int, *, microbatch_size: int | None = None) -> list[int]:
    """The rows before which a batch is split, with both of its ends.

    >>> bounds(7, 3), bounds(7, 2, microbatch_size=4)
    ([0, 3, 5, 7], [0, 4, 7])
    """
    if microbatch_size is not None:
        return [min(i * microbatch_size, size) for i in range(num + 1)]
    return [-(-size * i // num) for i in range(num + 1)]


def split(batch: Any, num: int, *, microbatch_size: int | None = None) -> list[Any]:
    """Split a batch along dim 0 of its tensors; plain values and 0-dimensional tensors are repeated.

    With `microbatch_size` every microbatch but the last has that many rows; else sizes differ by 1 at most.
    Raises `ConfigError` for a numpy array with as many rows: the program would meet all of it in each part.
    """
    size = batch_size(batch)
    _refuse_arrays(batch, size)
    leaves, spec = pytree.tree_flatten(batch)
    edges = bounds(size, num, microbatch_size=microbatch_size)
    sizes = [end - start for start, end in itertools.pairwise(edges)]
    # By leaf, so that one tensor in two places stays one tensor.
    parts = {id(leaf): leaf.split(sizes) if _has_rows(leaf) else (leaf,) * len(sizes) for leaf in leaves}
    columns = [parts[id(leaf)] for leaf in leaves]
    return [pytree.tree_unflatten([column[at] for column in columns], spec) for at in range(len(sizes))]


def _refuse_arrays(batch: Any, size: int) -> None:
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, np.ndarray) and leaf.ndim > 0 and len(leaf) == size > 1:
            raise ConfigError(
                f"{pytree.keystr(path)} is a numpy array with {size} rows, which is not split as the batch's "
                "tensors are; make it a tensor with torch.from_numpy"
            )


def with_count_as_tensor(batch: Any) -> Any:
    """The batch with a plain `num_items_in_batch` as a tensor: as a number it would be part of the key.

    >>> with_count_as_tensor({"num_items_in_batch": 3})
    {'num_items_in_batch': tensor(3)}
    """
    pairs, spec = pytree.tree_flatten_with_path(batch)
    found = [_is_given_count(path) and type(leaf) in {int, float} for path, leaf in pairs]
    if not any(found):
        return batch
    leaves = [torch.tensor(leaf) if plain else leaf for plain, (_, leaf) in zip(found, pairs, strict=True)]
    return pytree.tree_unflatten(leaves, spec)


def place_of_given_count(microbatch: Any) -> int | None:
    """Which of the microbatch's tensors is `num_items_in_batch`, if it has one."""
    pairs = pytree.tree_flatten_with_path(microbatch)[0]
    paths = [path for path, leaf in pairs if isinstance(leaf, torch.Tensor)]
    return next((at for at, path in enumerate(paths) if _is_given_count(path)), None)


def _is_given_count(path: pytree.KeyPath) -> bool:
    return len(path) == 1 and isinstance(path[0], pytree.MappingKey) and path[0].key == GIVEN_COUNT
