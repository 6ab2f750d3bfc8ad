"""Agreeing on a batch: all ranks work on the first rank's, whoever passed one.

A batch that every rank passes is compared by checksum, because loaders that differ per rank would train a
model that nobody asked for. A rank that passes none (see `Pipeline.feed`) is sent the tensors that its own
stages need; one small message tells it which recordings they fit.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError, EvenflowError, PeerError, RecordError
from evenflow.ir.placement import Placement
from evenflow.pipe.sharing import Overlap, overlaps, refuse_changes_between
from evenflow.runtime.mesh import Mesh
from evenflow.runtime.microbatch import tensors
from evenflow.runtime.recordings import Recordings, describe
from evenflow.runtime.tracing import Program
from evenflow.runtime.weights import Shares, Weight, shares_of

_FEED = "read on the first rank alone: for batch in pipe.feed(loader)"
_EACH = "data ranks, too, all pass the whole batch, of which each takes its own microbatches; "
FED = object()  # what `Pipeline.feed` yields where the batch is on the first rank
_NONE, _BATCH, _ERROR = range(3)
# Recording one kind of microbatch may show that another one must be asked again; each shows less.
_MOST_ROUNDS = 8
_BLOCKS, _BLOCK_BYTES = 256, 2**12  # of a large tensor, that are compared
_STRIDE = 2654435761  # a large prime: places that repeat nothing


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as microbatches; those of one of `forms` differ in their numbers alone.

    `whole` is the batch, where they are its rows, in order.
    """

    items: Sequence[Any]
    forms: Sequence[int]
    whole: Any = None


@dataclass(frozen=True, slots=True)
class Agreed:
    """For each microbatch the tensors that this rank needs, by place, and the number of its recording."""

    batches: tuple[dict[int, torch.Tensor], ...]
    recordings: tuple[int, ...]
    shares: Shares


@dataclass(frozen=True, slots=True)
class _Message:
    """From the first rank to those that passed no batch. `new`: microbatches that need a new recording.

    Those have no weight yet, because their recording tells it; every rank weighs them.
    """

    recordings: tuple[int | None, ...]
    new: dict[int, Any]
    weights: Sequence[Weight | None]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True, slots=True)
class _Own:
    """The rank's own batch: what is known of its microbatches (None: not recorded yet), and a fingerprint."""

    items: Sequence[Any]
    recordings: Sequence[int | None]
    weights: Sequence[Weight | None]
    overlaps: tuple[Overlap, ...]
    fingerprint: tuple[int, int, int]


# What a microbatch of a recording, by its number, counts for in the step's loss.
Weigh = Callable[[int, Any], Weight]


def agree(
    mesh: Mesh,
    recordings: Recordings,
    program: Program,
    prepare: Callable[[], Prepared | None],
    learn: Callable[[Any], int],
    weigh: Weigh,
    device: torch.device,
    placement: Placement,
) -> Agreed:
    """The batch of this step on this rank. `prepare` splits the rank's own batch (None where it has none).

    Raises `ConfigError` where the batches differ between ranks, `PeerError` where another rank refused it.
    """
    world = mesh.world
    mine, error = _attempt(prepare, recordings, program, weigh, compared=world.size > 1)
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
    if any(row[0] == _BATCH and row[1:] != rows[0][1:] for row in rows):
        shapes = world.gather(None if mine is None else _shapes(mine.items))
        other = next(rank for rank, row in enumerate(rows) if row[0] == _BATCH and row[1:] != rows[0][1:])
        raise ConfigError(
            f"your loaders differ per rank: rank 0 has {shapes[0]}, rank {other} has {shapes[other]}"
            f"{' with other numbers (or other Python values)' if shapes[0] == shapes[other] else ''}; "
            f"{_EACH if mesh.data.size > 1 else ''}seed them alike, or {_FEED}"
        )
    absent = [rank for rank, row in enumerate(rows) if row[0] == _NONE]
    if 0 < len(absent) < world.size - 1:
        others = [rank for rank in range(world.size) if rank not in absent]
        raise ConfigError(
            f"ranks {_listed(others)} passed a batch and ranks {_listed(absent)} none: pass the same batch "
            f"on every rank, or {_FEED}"
        )
    learning = _Learning(recordings, learn, weigh)
    if all(row[0] == _BATCH for row in rows):
        assert mine is not None
        new = {at: item for at, item in enumerate(mine.items) if mine.recordings[at] is None}
        numbers, shares = learning.complete(mine.recordings, mine.weights, new, mine.overlaps, mine.items)
        return Agreed(tuple(dict(enumerate(tensors(item))) for item in mine.items), numbers, shares)
    return _sent(mesh, recordings, mine, learning, absent, device, placement)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _attempt(
    prepare: Callable[[], Prepared | None],
    recordings: Recordings,
    program: Program,
    weigh: Weigh,
    *,
    compared: bool,
) -> tuple[_Own | None, EvenflowError | None]:
    """The rank's own batch, if it has one; or why it cannot work, for all to hear."""
    try:
        prepared = prepare()
        if prepared is None:
            return None, None
        items = prepared.items
        recordings.tracing.look(program)
        keys = {form: recordings.key(items[at]) for form, at in _first_of_each(prepared.forms).items()}
        found = [recordings.find(item, keys[form]) for item, form in zip(items, prepared.forms, strict=True)]
        weights = [
            None if number is None else weigh(number, item) for number, item in zip(found, items, strict=True)
        ]
        fingerprint = (*_fingerprint(prepared), zlib.crc32(repr(found).encode())) if compared else (0, 0, 0)
    except EvenflowError as error:
        return None, error
    entries = recordings.entries
    may_change = any(number is None or entries[number].graph.changed_leaves for number in found)
    return _Own(items, found, weights, overlaps(items) if may_change else (), fingerprint), None


@dataclass(frozen=True, slots=True)
class _Learning:
    recordings: Recordings
    learn: Callable[[Any], int]
    weigh: Weigh

    def complete(
        self,
        found: Sequence[int | None],
        weights: Sequence[Weight | None],
        new: Mapping[int, Any],
        shared: Sequence[Overlap],
        items: Sequence[Any] = (),
    ) -> tuple[tuple[int, ...], Shares]:
        """Record and weigh the new microbatches, of which several may be of one kind; `items` are all."""
        numbers, weighed = list(found), list(weights)
        waiting, rounds = dict(new), 0
        while waiting:
            if rounds == _MOST_ROUNDS:
                raise RecordError(
                    f"the program does something else each time that microbatch {min(waiting)} is recorded, "
                    "after others were: what it does must follow from the batch, not from earlier calls"
                )
            for at, item in waiting.items():
                known = self.recordings.find(item)
                number = self.learn(item) if known is None else known
                numbers[at], weighed[at] = number, self.weigh(number, item)
            # One that was known may have to be asked again, for what a new one does.
            waiting = {at: each for at, each in enumerate(items) if self.recordings.find(each) is None}
            rounds += 1
        complete = tuple(number for number in numbers if number is not None)
        refuse_changes_between(shared, [self.recordings.entries[number].graph for number in complete])
        return complete, shares_of([weight for weight in weighed if weight is not None])


def _sent(
    mesh: Mesh,
    recordings: Recordings,
    mine: _Own | None,
    learning: _Learning,
    absent: Sequence[int],
    device: torch.device,
    placement: Placement,
) -> Agreed:
    world = mesh.world
    message = world.share(_first_message(mine) if mine is not None else None, source=0)
    assert message is not None, "the first rank has a batch"
    numbers, shares = learning.complete(message.recordings, message.weights, message.new, message.overlaps)
    if mine is not None:
        batches = tuple(dict(enumerate(tensors(item))) for item in mine.items)
    else:
        batches = tuple({} for _ in numbers)
    for at, number in enumerate(numbers):
        entry = recordings.entries[number]
        for rank in (rank for rank in absent if at in mesh.share(len(numbers), rank)):
            stages = mesh.stages_of(rank, placement)
            needed = {leaf: value for stage in stages for leaf, value in entry.cut.sections[stage].batch}
            for leaf, value in needed.items():
                if world.rank == 0:
                    world.send(batches[at][leaf].to(device), rank)
                elif world.rank == rank:
                    info = entry.graph.values[value].info
                    like = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=device)
                    batches[at][leaf] = like.copy_(world.receive(like, 0))
    return Agreed(batches, numbers, shares)


def _first_message(mine: _Own) -> _Message:
    """Microbatches without a recording travel whole (as copies: a slice would take its whole batch along).

    One tensor in two places stays one, and keeps its attributes: all ranks must record the same program.
    """
    copies: dict[int, torch.Tensor] = {}

    def copied(leaf: Any) -> Any:  # any leaf of a batch
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
            vars(copies[id(leaf)]).update(vars(leaf))
        return copies[id(leaf)]

    pairs = enumerate(zip(mine.recordings, mine.items, strict=True))
    new = {at: pytree.tree_map(copied, item) for at, (number, item) in pairs if number is None}
    return _Message(tuple(mine.recordings), new, mine.weights, mine.overlaps)


def _first_of_each(forms: Sequence[int]) -> dict[int, int]:
    """Where each form is first."""
    return {form: at for at, form in reversed(list(enumerate(forms)))}


def _fingerprint(prepared: Prepared) -> tuple[int, int]:
    """Two whole numbers: of the batch's form, and of the numbers in it."""
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
    return int.from_bytes(form.digest(), "little"), numbers


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
