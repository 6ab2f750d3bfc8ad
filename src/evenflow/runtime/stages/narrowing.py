"""Narrowing: boundary tensors travel in bfloat16, in half the bytes, and are widened where they arrive.

Activations that get a gradient, and those gradients, are rounded between any two stages, wherever these live,
so that numbers do not depend on ranks and links. What needs no gradient (masks, tables, all of an
evaluation) goes as it is, and so do single numbers, such as a loss that is added to on its way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.cutting.positions import num_bytes
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.runtime.links.link import Parcel


@dataclass(frozen=True, slots=True)
class Narrowing:
    """In which type values travel; None: in their own.

    >>> info = TensorInfo((2, 3), (3, 1), torch.float32, requires_grad=True)
    >>> Narrowing(torch.bfloat16).num_bytes(info), Narrowing(None).num_bytes(info)
    (12, 24)
    """

    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.bfloat16):
            raise ConfigError(
                f"boundary_dtype={self.dtype!r} is neither None nor torch.bfloat16 (float16 has no room for "
                "large gradients)"
            )

    def num_bytes(self, info: TensorInfo) -> int:
        """Bytes of a value as it travels."""
        return num_bytes(self.info(info))

    def info(self, info: TensorInfo) -> TensorInfo:
        """What is known of a value as it travels."""
        return replace(info, dtype=self.dtype) if self._takes(info) else info

    def narrow(self, parcel: Parcel, infos: Sequence[TensorInfo]) -> Parcel:
        """A parcel as it travels; `infos` are those of its values."""
        return self._cast(parcel, infos, [self.dtype] * len(infos))

    def widen(self, parcel: Parcel, infos: Sequence[TensorInfo]) -> Parcel:
        """A parcel that has travelled, in its values' own types."""
        return self._cast(parcel, infos, [info.dtype for info in infos])

    def _cast(self, parcel: Parcel, infos: Sequence[TensorInfo], dtypes: Sequence[Any]) -> Parcel:
        triples = zip(parcel, infos, dtypes, strict=True)
        return tuple(
            tensor.to(dtype) if tensor is not None and self._takes(info) else tensor
            for tensor, info, dtype in triples
        )

    def _takes(self, info: TensorInfo) -> bool:
        is_large = info.requires_grad and info.dtype is torch.float32 and len(info.shape) > 0
        return self.dtype is not None and is_large
