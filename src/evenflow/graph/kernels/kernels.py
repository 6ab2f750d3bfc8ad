"""Kernels, as they are called: what they write, what they draw, whose numbers decide what they return."""

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

MASKS = (torch.bool, torch.uint8)  # an index of these types picks where it is true
# Kernels that update running statistics (arguments 3 and 4, when argument 5 says so) though no schema tells.
_BATCH_NORMS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


def written(kernel: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:  # kernel: an OpOverload
    """The tensors that a kernel writes, as its schema tells."""
    changed = [args[at] if at < len(args) else kwargs.get(name) for at, name in _written_arguments(kernel)]
    return [leaf for leaf in pytree.tree_leaves(changed) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _written_arguments(kernel: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(kernel._schema.arguments)
    return tuple((at, a.name) for at, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def changed_unsaid(kernel: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors that a kernel writes though its schema does not tell."""
    return args[3:5] if kernel.overloadpacket.__name__ in _BATCH_NORMS and args[5] else ()


def deciding(kernel: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:  # kernel: an OpOverload
    """The tensors whose numbers decide a result's shape; an index has that tag but means its masks only."""
    if kernel is torch.ops.aten.index.Tensor:
        return [index for index in args[1] if index is not None and index.dtype in MASKS]
    if kernel is torch.ops.aten.masked_select.default:
        return [args[1]]
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator that kernels on `device` draw from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def draws(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # kernel: an OpOverload
    """Whether this call of a kernel draws random numbers: by its tag, unless its dropout is zero."""
    if torch.Tag.nondeterministic_seeded not in kernel.tags:
        return False
    for position, argument in enumerate(kernel._schema.arguments):
        if argument.name == "dropout_p":
            given = kwargs.get(
                "dropout_p", args[position] if position < len(args) else argument.default_value
            )
            return bool(given)
    return True
