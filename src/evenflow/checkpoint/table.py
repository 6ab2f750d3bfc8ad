"""The table of a checkpoint: which tensors it holds, of which shapes and types, and where each chunk lies.

A tensor may be saved in chunks, by several ranks. The table comes from a file and so perhaps from a stranger:
whatever is read by it has been checked here, before anything is allocated.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.plain_data import read_as

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_MOST_DIMS, _MOST_CHUNKS = 64, 4096  # a chunk is a rank's


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor: where it begins, its shape, in which file and under which key it lies."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    checksum: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor: chunks that have no element in common and are all of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.name} is of the type {self.dtype!r}, which this torch does not have")
        if len(self.shape) > _MOST_DIMS or len(self.chunks) > _MOST_CHUNKS:
            raise ConfigError(
                f"{self.name} has {len(self.shape)} dimensions and {len(self.chunks)} chunks: no tensor has"
            )
        for chunk in self.chunks:
            self._check(chunk)
        if sum(math.prod(chunk.shape) for chunk in self.chunks) != math.prod(self.shape):
            raise ConfigError(f"the chunks of {self.name} are not the whole tensor of shape {[*self.shape]}")
        # Those that reach beyond where the sweep along the first dimension is.
        live: list[Chunk] = []
        for chunk in sorted((each for each in self.chunks if math.prod(each.shape)), key=_begins):
            live = [each for each in live if each.offsets[0] + each.shape[0] > chunk.offsets[0]]
            if any(_overlap(chunk, other) for other in live):
                raise ConfigError(f"two chunks of {self.name} overlap, one of them at {chunk.offsets}")
            live.append(chunk)

    def _check(self, chunk: Chunk) -> None:
        dims = len(self.shape)
        fits = len(chunk.offsets) == len(chunk.shape) == dims and all(
            at + size <= most for at, size, most in zip(chunk.offsets, chunk.shape, self.shape, strict=True)
        )
        if not fits:
            raise ConfigError(f"a chunk of {self.name} does not lie in its shape, {[*self.shape]}")


@dataclass(frozen=True, slots=True)
class _Whole:
    tensors: tuple[Saved, ...]


def _begins(chunk: Chunk) -> tuple[int, ...]:
    return chunk.offsets


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )


def as_json(tensors: Sequence[Saved]) -> dict[str, Any]:
    """The table as JSON can hold it."""
    return asdict(_Whole(tuple(tensors)))


def from_json(content: object) -> dict[str, Saved]:
    """The tensors of a table by name; raises `ConfigError` for what is wrong in it.

    >>> chunk = {"offsets": [0], "shape": [2], "file": "a.safetensors", "key": "w", "checksum": 0}
    >>> table = {"tensors": [{"name": "w", "dtype": "float32", "shape": [3], "chunks": [chunk]}]}
    >>> from_json(table)
    Traceback (most recent call last):
    evenflow.errors.ConfigError: the chunks of w are not the whole tensor of shape [3]
    """
    found: dict[str, Saved] = {}
    for saved in read_as(_Whole, content, lambda _kind, _place: 0).tensors:
        if saved.name in found:
            raise ConfigError(f"there are two tensors {saved.name}")
        found[saved.name] = saved
    return found


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's elements, on the host, in order; of no use against who means harm.

    >>> checksum(torch.zeros(1, dtype=torch.uint8)) == zlib.crc32(bytes(1))
    True
    """
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data) if flat.numel() else 0
