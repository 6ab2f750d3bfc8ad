"""Splitter: a batch as microbatches."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.nouns.template import flatten_tree
from evenflow.runtime.recorded import microbatch as microbatches
from evenflow.runtime.recorded.microbatch import Microbatches


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as microbatches; those of one of `forms` differ in their numbers alone.

    `whole` is the batch, where they are its rows, in order.
    """

    items: Sequence[Any]
    forms: Sequence[int]
    whole: Any = None


@dataclass(frozen=True, slots=True)
class Splitter:
    """Turns a batch into microbatches, always in the same way."""

    num_ranks: int
    num_microbatches: int | None
    microbatch_size: int | None
    split_batch: Callable[[Any], Sequence[Any]] | None
    num_replicas: int = 1  # of the pipeline, among which the microbatches are shared out
    dtype: torch.dtype | None = None  # that of floating-point tensors, where it is to be another

    def __call__(self, given: Any) -> Prepared:
        batch = given if self.dtype is None else pytree.tree_map(self._cast, given)
        if isinstance(batch, Microbatches) or self.split_batch is not None:
            items = list(batch.items if isinstance(batch, Microbatches) else self.split_batch(batch))  # type: ignore[misc]  # one of the two holds
            if not items:
                raise ConfigError("the batch was split into no microbatch at all")
            flatten_tree(items)  # as below
            return Prepared([microbatches.with_count_as_tensor(item) for item in items], range(len(items)))
        flatten_tree(batch)  # teaches torch the dataclasses and mappings in it
        size = microbatches.batch_size(batch)
        if size == 0:
            raise ConfigError("the batch has no rows")
        num = microbatches.count(
            size,
            num_microbatches=self.num_microbatches,
            microbatch_size=self.microbatch_size,
            num_ranks=self.num_ranks,
            num_replicas=self.num_replicas,
        )
        batch = microbatches.with_count_as_tensor(batch)
        rows = microbatches.bounds(size, num, microbatch_size=self.microbatch_size)
        items = microbatches.split(batch, num, microbatch_size=self.microbatch_size)
        return Prepared(items, [end - start for start, end in itertools.pairwise(rows)], batch)

    def _cast(self, leaf: Any) -> Any:  # any leaf of a batch
        return leaf.to(self.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
