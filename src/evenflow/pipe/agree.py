"""Agreeing on a batch: all ranks work on the first rank's, whoever passed one.

A batch that every rank passes is compared by checksum, because loaders that differ per rank would train a
model that nobody asked for. A rank that passes none (see `Pipeline.feed`) is sent the tensors that its own
stages need; one small message tells it which recordings they fit.
"""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, EvenflowError, PeerError
from evenflow.ir.placement import Placement
from evenflow.runtime.recordings import Program, Recordings, describe, tensors
from evenflow.runtime.world import World

FED = object()  # what `Pipeline.feed` yields where the batch is on the first rank
_NONE, _BATCH, _ERROR = range(3)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as microbatches, with each one's weight in the step's loss, and how many rows it had."""

    items: Sequence[Any]
    shares: Sequence[float]
    size: int


@dataclass(frozen=True, slots=True)
class Agreed:
    """For each microbatch the tensors that this rank needs, by place, and the number of its recording."""

    batches: tuple[dict[int, torch.Tensor], ...]
    recordings: tuple[int, ...]
    shares: Sequence[float]
    size: int


@dataclass(frozen=True, slots=True)
class _Message:
    """From the first rank to those that passed no batch. `new`: microbatches that need a new recording."""

    recordings: tuple[int, ...]
    new: dict[int, Any]
    shares: Sequence[float]
    size: int


def agree(
    world: World,
    recordings: Recordings,
    program: Program,
    prepare: Callable[[], Prepared | None],
    learn: Callable[[Any], int],
    device: torch.device,
    placement: Placement,
) -> Agreed:
    """The batch of this step on this rank. `prepare` splits the rank's own batch (None where it has none).

    Raises `ConfigError` where the batches differ between ranks, `PeerError` where another rank refused it.
    """
    mine, found, fingerprint, error = _attempt(prepare, recordings, program, compared=world.size > 1)
    kind = _ERROR if error is not None else _NONE if mine is None else _BATCH
    rows = world.gather_numbers([kind, *fingerprint])
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
    if any(row[0] == _BATCH and row[1:] != rows[0][1:] for row in rows):
        shapes = world.gather(None if mine is None else _shapes(mine))
        other = next(rank for rank, row in enumerate(rows) if row[0] == _BATCH and row[1:] != rows[0][1:])
        raise ConfigError(
            f"your loaders differ per rank: rank 0 has {shapes[0]}, rank {other} has {shapes[other]}"
            f"{' with other numbers (or other Python values)' if shapes[0] == shapes[other] else ''}; "
            "seed them alike, or read on the first rank alone: for batch in pipe.feed(loader)"
        )
    if all(row[0] == _BATCH for row in rows):
        assert mine is not None
        known = tuple(
            _recording(recordings, program, item, learn) if number is None else number
            for number, item in zip(found, mine.items, strict=True)
        )
        return Agreed(
            tuple(dict(enumerate(tensors(item))) for item in mine.items), known, mine.shares, mine.size
        )
    absent = [rank for rank, row in enumerate(rows) if row[0] == _NONE]
    message = _first_message(mine, found) if mine is not None else None
    return _sent(world, recordings, program, mine, message, learn, absent, device, placement)


def _attempt(
    prepare: Callable[[], Prepared | None], recordings: Recordings, program: Program, *, compared: bool
) -> tuple[Prepared | None, list[int | None], list[int], EvenflowError | None]:
    """The rank's own batch, its known recordings and fingerprint; or why it cannot work, for all to hear."""
    try:
        mine = prepare()
        recordings.look(program)
        found = [] if mine is None else [recordings.find(program, item) for item in mine.items]
        if mine is None or not compared:
            return mine, found, [0, 0, 0], None
        return mine, found, [*_fingerprint(mine), zlib.crc32(repr(found).encode())], None
    except EvenflowError as error:
        return None, [], [0, 0, 0], error


def _recording(recordings: Recordings, program: Program, item: Any, learn: Callable[[Any], int]) -> int:
    found = recordings.find(program, item)
    return learn(item) if found is None else found


def _sent(
    world: World,
    recordings: Recordings,
    program: Program,
    mine: Prepared | None,
    message: _Message | None,
    learn: Callable[[Any], int],
    absent: Sequence[int],
    device: torch.device,
    placement: Placement,
) -> Agreed:
    message = world.share(message, source=0)
    assert message is not None, "the first rank has a batch"
    numbers = list(message.recordings)
    for at, item in message.new.items():
        numbers[at] = _recording(recordings, program, item, learn)
    if mine is not None:
        batches = tuple(dict(enumerate(tensors(item))) for item in mine.items)
    else:
        batches = tuple({} for _ in numbers)
    for at, number in enumerate(numbers):
        entry = recordings.entries[number]
        for rank in absent:
            needed = {leaf: v for s in placement.stages_on(rank) for leaf, v in entry.cut.sections[s].batch}
            for leaf, value in needed.items():
                if world.rank == 0:
                    world.send(batches[at][leaf].to(device), rank)
                elif world.rank == rank:
                    info = entry.graph.values[value].info
                    like = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=device)
                    batches[at][leaf] = like.copy_(world.receive(like, 0))
    return Agreed(batches, tuple(numbers), message.shares, message.size)


def _first_message(mine: Prepared, found: Sequence[int | None]) -> _Message:
    """Microbatches without a recording travel whole (as copies: a slice would take its whole batch along)."""

    def copied(leaf: Any) -> Any:  # any leaf of a batch
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    pairs = enumerate(zip(found, mine.items, strict=True))
    new = {at: pytree.tree_map(copied, item) for at, (number, item) in pairs if number is None}
    return _Message(tuple(-1 if n is None else n for n in found), new, mine.shares, mine.size)


def _fingerprint(prepared: Prepared) -> list[int]:
    """Two whole numbers: of the batch's form, and of the numbers in it."""
    form = hashlib.blake2b(digest_size=7)
    numbers = 0
    for item in prepared.items:
        leaves, spec = pytree.tree_flatten(item)
        form.update(repr((spec, [describe(leaf) for leaf in leaves])).encode())
        for tensor in tensors(item):
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            numbers = zlib.crc32(raw.data, numbers)
    return [int.from_bytes(form.digest(), "little"), numbers]


def _shapes(prepared: Prepared) -> str:
    found = tensors(prepared.items[0])
    shapes = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in found)
    return f"{len(prepared.items)} microbatches of ({shapes})"
