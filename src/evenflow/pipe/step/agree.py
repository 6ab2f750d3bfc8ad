"""What ranks tell each other of their batches, and hold against each other.

A batch that every rank passes is compared by checksum, because loaders that differ per rank would train a
model that nobody asked for.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, EvenflowError, PeerError
from evenflow.pipe.given.splitter import Prepared
from evenflow.pipe.step.sharing import Overlap
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.recorded.microbatch import tensors
from evenflow.runtime.recorded.recordings import describe
from evenflow.runtime.recorded.weights import Shares, Weight

_FEED = "read on the first rank alone: for batch in pipe.feed(loader)"
_EACH = "data ranks, too, all pass the whole batch, of which each takes its own microbatches; "
_NONE, _BATCH, _ERROR = range(3)
_BLOCKS, _BLOCK_BYTES = 256, 2**12  # of a large tensor, that are compared
_STRIDE = 2654435761  # a large prime: places that repeat nothing


@dataclass(frozen=True, slots=True)
class Agreed:
    """For each microbatch the tensors that this rank needs, by place, and the number of its recording.

    `items` are the microbatches as this rank passed them; empty where it passed none.
    """

    batches: tuple[dict[int, torch.Tensor], ...]
    recordings: tuple[int, ...]
    shares: Shares
    items: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a batch's microbatches. `new`: those that need a new recording, by place.

    Those have no recording and no weight yet, because their recording tells it; every rank weighs them.
    """

    recordings: Sequence[int | None]
    new: Mapping[int, Any]
    weights: Sequence[Weight | None]
    overlaps: tuple[Overlap, ...]

    def copied(self) -> "Known":
        """The same, to be sent: with copies of the new, for a slice would take its whole batch along.

        One tensor in two places stays one, and keeps its attributes: all ranks must record the same program.
        """
        copies: dict[int, torch.Tensor] = {}

        def copy(leaf: Any) -> Any:  # any leaf of a batch
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = leaf.clone()
                vars(copies[id(leaf)]).update(vars(leaf))
            return copies[id(leaf)]

        return replace(self, new={at: pytree.tree_map(copy, item) for at, item in self.new.items()})


@dataclass(frozen=True, slots=True)
class Own:
    """The rank's own batch as microbatches, what is known of these, and a fingerprint."""

    items: Sequence[Any]
    known: Known
    fingerprint: tuple[int, int, int]


def compare(mesh: Mesh, mine: Own | None, error: EvenflowError | None) -> list[int]:
    """Which ranks passed no batch, the same on all of them; collective.

    `error`: why this one refuses its own, which is raised again. Raises `ConfigError` where the batches
    differ between ranks, or some passed none and others do not feed them, `PeerError` where another rank
    refused its batch.
    """
    world = mesh.world
    kind = _ERROR if error is not None else _NONE if mine is None else _BATCH
    rows = world.gather_numbers([kind, *((0, 0, 0) if mine is None else mine.fingerprint)])
    if any(row[0] == _ERROR for row in rows):
        messages = world.gather(str(error) if error is not None else None)
        if error is not None:
            raise error
        rank = next(rank for rank, message in enumerate(messages) if message is not None)
        raise PeerError(f"rank {rank} refused its batch: {messages[rank]}")
    if rows[0][0] == _NONE:
        raise ConfigError(
            "the first rank passed no batch; only the other ranks may leave that to pipe.feed(loader)"
        )
    others = [rank for rank, row in enumerate(rows) if row[0] == _BATCH and row[1:] != rows[0][1:]]
    if others:
        shapes = world.gather(None if mine is None else _shapes(mine.items))
        raise ConfigError(
            f"your loaders differ per rank: rank 0 has {shapes[0]}, rank {others[0]} has {shapes[others[0]]}"
            f"{' with other numbers (or other Python values)' if shapes[0] == shapes[others[0]] else ''}; "
            f"{_EACH if mesh.data.size > 1 else ''}seed them alike, or {_FEED}"
        )
    absent = [rank for rank, row in enumerate(rows) if row[0] == _NONE]
    if 0 < len(absent) < world.size - 1:
        present = [rank for rank in range(world.size) if rank not in absent]
        raise ConfigError(
            f"ranks {_listed(present)} passed a batch and ranks {_listed(absent)} none: pass the same batch "
            f"on every rank, or {_FEED}"
        )
    return absent


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def fingerprint(prepared: Prepared, recordings: Sequence[int | None]) -> tuple[int, int, int]:
    """Three whole numbers: of the batch's form, of the numbers in it, and of what was recorded of it."""
    form = hashlib.blake2b(repr(list(prepared.forms)).encode(), digest_size=7)
    numbers, last = 0, None
    for item in prepared.items if prepared.whole is None else [prepared.whole]:
        leaves, spec = pytree.tree_flatten(item)
        described = spec, [describe(leaf) for leaf in leaves]
        form.update(b"the same" if described == last else repr(described).encode())
        last = described
        for tensor in leaves:
            if not isinstance(tensor, torch.Tensor):
                continue
            numbers = zlib.crc32(_sample(tensor).numpy().data, numbers)
    return int.from_bytes(form.digest(), "little"), numbers, zlib.crc32(repr(recordings).encode())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; of a large one, of blocks all over it, and of its end.

    Two loaders that differ do so nearly everywhere, and 64 MiB would take 30 ms of every step.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.nbytes > _BLOCKS * _BLOCK_BYTES:
        width, stretch = _BLOCK_BYTES // flat.element_size(), flat.numel() // _BLOCKS
        # Not at the beginning of each stretch, which may be the border of a picture.
        places = (at * stretch + at * _STRIDE % (stretch - width + 1) for at in range(_BLOCKS))
        flat = torch.cat([*(flat[place : place + width] for place in places), flat[-width:]])
    return flat.cpu().view(torch.uint8)


def _shapes(items: Sequence[Any]) -> str:
    found = tensors(items[0])
    shapes = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in found)
    return f"{len(items)} microbatches of ({shapes})"
