"""Who gets what the last stage's process has computed: every rank, the first one, or nobody else."""

from typing import Any, Literal, TypeAlias

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.runtime.world import World

Gather: TypeAlias = bool | Literal["main"]


def check_gather(gather: object) -> None:
    """Raise `ConfigError` for a `gather=` that there is not."""
    if not isinstance(gather, bool) and gather != "main":
        raise ConfigError(
            f"gather={gather!r} is none of True (every rank), 'main' (the first rank alone) and False (it "
            "stays on the rank that computed it)"
        )


def delivered(world: World, tree: Any, source: int, gather: Gather) -> Any:
    """`tree`, which `source` has, on the ranks that are to have it, and None on others; collective.

    Tensors come in the host's memory, but where they stay on the rank that computed them.
    """
    if world.size == 1 or gather is False:
        return tree
    if gather is True:
        return world.share(on_host(tree), source)
    if source == 0:
        return on_host(tree)
    return _sent(world, tree, source)


def on_host(tree: Any) -> Any:
    """The tree with its tensors in the host's memory, as pickle is to take them."""
    return pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _sent(world: World, tree: Any, source: int) -> Any:
    """Send a tree to the first rank: its form and plain values to all, tensors to that one alone."""
    leaves: list[Any] = []
    form = None
    if world.rank == source:
        found, spec = pytree.tree_flatten(tree)
        leaves = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        form = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in found], spec
    form = world.share(form, source)
    assert form is not None, "the source has a tree"
    if world.rank == source:
        for leaf in leaves:
            world.send(leaf, 0)
        return None
    if world.rank != 0:
        return None
    got = [
        world.receive(torch.empty_like(leaf, device=world.device), source).cpu()
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in form[0]
    ]
    return pytree.tree_unflatten(got, form[1])
