"""DTensors: tensors of which each of several processes holds a part, or a copy. torch's own.

Importing them takes a second, so that nobody does who has none.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Whether it is one.

    >>> is_dtensor(torch.zeros(1))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, in the same memory: all of it, unless it is a DTensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def with_local(like: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process has `local`, parted as `like` is; or `local` itself."""
    if not is_dtensor(like):
        return local
    shape, stride = like.shape, like.stride()
    made: torch.Tensor = type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
    return made


def is_first_holder(tensor: torch.Tensor) -> bool:
    """Whether of those that hold a part or a copy of a tensor this process is the first."""
    return not is_dtensor(tensor) or not any(tensor.device_mesh.get_coordinate() or ())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; collective among those that have a part of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
