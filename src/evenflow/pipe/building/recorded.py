"""A model recorded for planning: nothing is cut, and no parameter gets memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.cost.recorded import Recorded
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.pipe.given.cuts import leaf_share
from evenflow.pipe.given.reading import check_loss, check_trainable
from evenflow.pipe.given.refuse import refuse_unfit
from evenflow.pipe.given.splitter import Splitter
from evenflow.pipe.parameters.number_sources import recipes_of
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.recorded.parameters import parameters_by_name
from evenflow.runtime.recorded.tracing import Leaves, Program, Tracing
from evenflow.runtime.recorded.weights import rows_of

_FINEST = 8  # ranks


def recorded(
    model: torch.nn.Module,
    *,
    loss: Program,
    example: Any,
    splitter: Splitter,
    max_leaf_share: float,
    device: torch.device,
    atomic: Sequence[type[torch.nn.Module]] = (),
    seed: int = 0,
) -> Recorded:
    """Record the loss function on the first microbatch of `example`, as `evenflow.pipeline` would.

    Raises `ConfigError` for what cannot work as given, `RecordError` where the model cannot be recorded.

    >>> def squares(model, batch):
    ...     return model(batch["x"]).square().mean()
    >>> found = recorded(
    ...     torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()),
    ...     loss=squares,
    ...     example={"x": torch.ones(8, 4)},
    ...     splitter=Splitter(1, 2, None, None),
    ...     max_leaf_share=0.0,
    ...     device=torch.device("cpu"),
    ... )
    >>> found.num_rows, [node.name for node in found.graph.chain]
    (4, ['0', '1', 'square', 'mean'])
    """
    refuse_unfit(model, loading=False)
    item = splitter(example).items[0]
    fakes = FakeParameters(model, device)
    recipes_of(
        model, parameters_by_name(model, fakes.tied), None, seed=seed
    )  # gives buffers without memory theirs
    leaves = Leaves(max_leaf_share, exact=False, opened=(), atomic=tuple(atomic))
    graph = Tracing(model, fakes, device=device, leaves=leaves).trace(loss, item)
    check_loss(graph)
    check_trainable(graph)
    return Recorded(graph, model, tensors(item), rows_of(item) or 1, device)


def planned_leaf_share(num_ranks: int, *, compiles: bool = False) -> float:
    """The largest share of all FLOPs that a leaf may hold, to plan for so many ranks: from 8 on the same.

    Where blocks are compiled they stay whole, as in `leaf_share`.

    >>> planned_leaf_share(2), planned_leaf_share(1000)
    (0.125, 0.03125)
    """
    return leaf_share(min(num_ranks, _FINEST), compiles=compiles)


def row_tokens(example: object) -> float:
    """The most whole numbers in a row: tokens; 1 where there are none."""
    whole = (
        leaf
        for leaf in pytree.tree_leaves(example)
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and not leaf.is_floating_point()
    )
    return float(max((leaf[0].numel() for leaf in whole), default=1))
