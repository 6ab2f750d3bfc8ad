"""Results that real arguments alone decide, of a function that is handed fake ones too.

Packing a sequence returns how many rows each step has, which follows from the lengths, whatever the rows
hold. The recorder notes such a result as a call of its own, in which zeros stand for what was fake: it then
depends on the batch alone, and can be asked of the next microbatch before that runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Zeros:
    """Stands for a fake argument; has its form, and no numbers that matter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any  # torch.dtype: torch does not type its dtypes for the checker


def zeros_like(fake: torch.Tensor) -> Zeros:
    """What stands for a fake argument."""
    return Zeros(tuple(fake.shape), tuple(fake.stride()), fake.dtype)


def result_at(function: Callable[..., Any], position: int) -> Callable[..., torch.Tensor]:
    """A function of the same arguments, with `Zeros` among them, that returns one leaf of the result."""
    return partial(_called, function, position)


def _called(function: Callable[..., Any], position: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    device = next((each for each in given if each.type != "cpu"), torch.device("cpu"))
    filled = [_zeros(leaf, device) if isinstance(leaf, Zeros) else leaf for leaf in leaves]
    real_args, real_kwargs = pytree.tree_unflatten(filled, spec)
    with torch.no_grad():
        found = pytree.tree_leaves(function(*real_args, **real_kwargs))[position]
    assert isinstance(found, torch.Tensor), "so it was when it was recorded"
    return found


def _zeros(form: Zeros, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=device).zero_()
