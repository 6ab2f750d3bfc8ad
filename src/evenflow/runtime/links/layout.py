"""How a tensor lies in memory, and how it travels: as one dense block, laid out again at the other end.

Kernels may add in another order when strides differ, so boundary tensors and gradients keep theirs.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape, strides and type of a tensor.

    `is_dense`: whether the elements fill one block without gaps or overlaps.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any  # torch.dtype
    is_dense: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_dense", _is_dense(self.shape, self.stride))

    @staticmethod
    def of(tensor: torch.Tensor) -> "Layout":
        return Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions from the largest stride to the smallest."""
        return tuple(sorted(range(len(self.shape)), key=lambda d: (-self.stride[d], d)))


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def pack(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The tensor's elements as a flat block in the order of `layout` (without a copy where it is dense)."""
    tensor = tensor.resolve_conj().resolve_neg()
    if Layout.of(tensor) == layout and layout.is_dense:
        return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return tensor.permute(layout.order).contiguous().view(-1)


def empty(layout: Layout, device: torch.device) -> torch.Tensor:
    """A flat block to receive into."""
    return torch.empty(math.prod(layout.shape), dtype=layout.dtype, device=device)


def unpack(block: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The tensor that `pack` was given: the same elements at the same strides."""
    if layout.is_dense:
        return block.as_strided(layout.shape, layout.stride)
    order = layout.order
    dense = block.view([layout.shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])
    if 0 in layout.stride:  # an expanded tensor: one element stands for many
        single = tuple(stride == 0 for stride in layout.stride)
        narrow = dense[tuple(slice(0, 1) if one else slice(None) for one in single)]
        base = torch.empty_strided(narrow.shape, layout.stride, dtype=layout.dtype, device=block.device)
        return base.copy_(narrow).expand(layout.shape)
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=block.device).copy_(
        dense
    )
