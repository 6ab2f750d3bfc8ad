"""SharedMemoryLink: parcels between processes of one host, with one copy.

A sender copies a parcel into a *slot*, a piece of memory that both processes have mapped, and tells the
receiver so over a Unix socket. What the receiver takes is the slot itself; when the last of its tensors is
gone, a flag beside the slot says so, and it is used again. Slots are made as they are needed and handed over
as open files without a name: whatever ends a process, nothing of them is left behind. A message wakes who
waits for it, so no thread stands between two ranks and takes a processor from them, as Gloo's do: on two
cores, one parcel in ten then came 5 to 9 ms late (measured 2026-11-22).

A send waits only where the receiver's program is sixteen receives behind, so that a fast rank does not fill
the host's memory. How far that is stands in memory too, so that nobody is told what nobody waits for.
"""

import contextlib
import errno
import math
import mmap
import os
import pickle
import select
import socket
import struct
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from evenflow.errors import ConfigError, PeerError, ScheduleError
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.runtime.inflight import Parcel
from evenflow.runtime.links.layout import Layout, unpack
from evenflow.runtime.links.link import Link, Manifest

_ALIGNMENT_BYTES = 64  # each tensor begins where torch's own would
_LARGEST_MESSAGE_BYTES = 2**17
_MOST_AHEAD = 16  # parcels for receives that the peer's program has perhaps not reached
_SLOTS_PER_FILE = 16  # a process may have a thousand files open; what nobody has written takes no memory
_FORMS_KEPT = 4  # of each slot
_LOOKS_EVERY_MS = 1  # at how far the peer's program is, while a send waits for that

# A message: the op that it is for, then the slot (-1: the parcel is empty). Behind that stand, pickled, the
# parcel's layouts, where they are not those of the last parcel of its key. A message that begins with
# `_NEW_FILE` instead says how large each slot of a file is, which comes with the next.
_OP = struct.Struct("<4i")  # source, target, microbatch, payload
_SLOT = struct.Struct("<i")
_NEW_FILE, _BYTES = struct.pack("<4i", -1, -1, -1, -1), struct.Struct("<q")
_PAYLOADS = tuple(Payload)
_HEAD_BYTES = _OP.size + _SLOT.size


class _Form:
    """How the tensors of a parcel lie in a slot."""

    def __init__(self, layouts: tuple[Layout | None, ...]) -> None:
        self.layouts = layouts
        places, end = [], 0
        for layout in layouts:
            places.append(end)
            size = 0 if layout is None else math.prod(layout.shape) * layout.dtype.itemsize
            end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.places, self.num_bytes = tuple(places), end
        # Sizes of slots are powers of two, so that parcels of like sizes share them.
        self.slot_bytes = max(mmap.PAGESIZE, 1 << (end - 1).bit_length()) if end else 0

    def fits(self, parcel: Parcel) -> bool:
        """Whether the tensors of a parcel lie so."""
        return len(parcel) == len(self.layouts) and all(map(_lies_as, parcel, self.layouts))

    def filled(self, slot: memoryview) -> Callable[[Parcel], None]:
        """What copies the tensors of a parcel into this slot."""
        pairs = zip(self.layouts, self.places, strict=True)
        with torch.inference_mode(mode=False):  # they are used in whatever mode a later parcel is sent
            places = [_place_in(slot, layout, place) for layout, place in pairs]

        def fill(parcel: Parcel) -> None:
            for tensor, place in zip(parcel, places, strict=True):
                if place is not None and tensor is not None:
                    block, order = place
                    given = tensor.detach()
                    block.copy_(given if order is None else given.permute(order))

        return fill

    def opened(self, slot: memoryview) -> Parcel:
        """The tensors that lie in a slot, as long as they need it."""
        pairs = zip(self.layouts, self.places, strict=True)
        return tuple(None if layout is None else _opened(slot, layout, place) for layout, place in pairs)


def _lies_as(tensor: torch.Tensor | None, layout: Layout | None) -> bool:
    if tensor is None or layout is None:
        return tensor is None and layout is None
    return tensor.shape == layout.shape and tensor.stride() == layout.stride and tensor.dtype is layout.dtype


def _place_in(
    slot: memoryview, layout: Layout | None, place: int
) -> tuple[torch.Tensor, tuple[int, ...] | None] | None:
    """Where the elements of a tensor go, and the order of dimensions in which they do (None: as they are)."""
    number = 0 if layout is None else math.prod(layout.shape)
    if layout is None or not number:
        return None
    block = torch.frombuffer(slot, dtype=layout.dtype, count=number, offset=place)
    if layout.is_dense:
        return block.as_strided(layout.shape, layout.stride), None
    return block.view([layout.shape[d] for d in layout.order]), layout.order


def _opened(slot: memoryview, layout: Layout, place: int) -> torch.Tensor:
    number = math.prod(layout.shape)
    if not number:
        return unpack(torch.empty(0, dtype=layout.dtype, device="cpu"), layout)
    return unpack(torch.frombuffer(slot, dtype=layout.dtype, count=number, offset=place), layout)


@dataclass
class _Slot:
    """A piece of shared memory, and the flag beside it: 1 from its sender's filling on, 0 when it is free."""

    memory: memoryview
    flags: memoryview
    number: int
    fill: dict[_Form, Callable[[Parcel], None]] = field(default_factory=dict)  # of the last forms
    held: "weakref.ref[memoryview] | None" = None  # as last taken
    process: int = field(default_factory=os.getpid)

    def filled(self, form: _Form) -> Callable[[Parcel], None]:
        """What copies the tensors of a parcel of this form into the slot."""
        if form not in self.fill:
            if len(self.fill) == _FORMS_KEPT:
                self.fill.clear()
            self.fill[form] = form.filled(self.memory)
        return self.fill[form]

    def let_go(self, _: object) -> None:
        if os.getpid() == self.process:  # not a copy of this in a forked child
            self.flags[self.number] = 0


@dataclass
class _Peer:
    """One end of the connection with another rank."""

    rank: int
    socket: socket.socket
    board: memoryview  # how many receives from the peer this rank's program has reached, for it to see
    their_board: memoryview | None = None  # the same of the peer, which sends it first of all
    num_sent: int = 0
    has_ended: bool = False
    own: list[_Slot] = field(default_factory=list)  # that this rank fills, by number
    of_size: defaultdict[int, list[tuple[int, _Slot]]] = field(default_factory=partial(defaultdict, list))
    theirs: list[_Slot] = field(default_factory=list)  # that the peer fills, by number
    inbox: deque[bytes] = field(default_factory=deque)  # of this step, and perhaps already of the next
    # In the order in which the peer sends: receives, as messages name them, and their parcels' keys.
    expected: deque[tuple[Recv, bytes, tuple[Any, ...]]] = field(default_factory=deque)


class SharedMemoryLink(Link):
    """One rank's end; `sockets` lead to the other ranks (see `neighbours`), and are the link's own."""

    def __init__(
        self,
        placement: Placement,
        rank: int,
        sockets: Mapping[int, socket.socket],
        *,
        timeout_seconds: float,
    ) -> None:
        self._rank_of, self._rank = placement.rank_of, rank
        self._timeout_seconds = timeout_seconds
        self._peers = {rank: _Peer(rank, each, _sent_board(each)) for rank, each in sockets.items()}
        for each in sockets.values():
            each.setblocking(False)
        weakref.finalize(self, _close, list(sockets.values()))
        self._told: dict[tuple[Any, ...], _Form] = {}  # by the parcel's key
        self._known: dict[tuple[Any, ...], _Form] = {}
        self._arrived: dict[Recv, tuple[int, _Form]] = {}  # the slot, and what is in it

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        for peer in self._peers.values():
            peer.expected.clear()
        for op, manifest in receives:
            self._peers[self._rank_of[op.source]].expected.append((op, _name(op), manifest.key))

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        peer = self._peers[self._rank_of[op.target]]
        form, layouts = self._told.get(manifest.key), b""
        try:
            if form is None or not form.fits(parcel):
                form = _Form(tuple(None if tensor is None else Layout.of(tensor) for tensor in parcel))
                layouts = pickle.dumps(form.layouts)
                if len(layouts) > _LARGEST_MESSAGE_BYTES - _HEAD_BYTES:
                    raise _too_many_tensors(op, len(parcel))
            if peer.num_sent - self._reached_by(peer) >= _MOST_AHEAD:
                self._await_program(peer)
            number = -1
            if form.slot_bytes:
                number, slot = self._slot(peer, form.slot_bytes)
                slot.filled(form)(parcel)
                slot.flags[slot.number] = 1
            self._tell(peer, _name(op) + _SLOT.pack(number) + layouts)
            self._told[manifest.key] = form
        except (ConnectionError, TimeoutError) as error:
            raise self._lost(peer, op, error) from error
        peer.num_sent += 1

    def post(self, op: Recv) -> None:
        self._peers[self._rank_of[op.source]].board[0] += 1

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        for op in receives:
            self.post(op)
        for send in sends:
            self.send(*send)

    def take(self, op: Recv) -> Parcel:
        peer = self._peers[self._rank_of[op.source]]
        try:
            found = self._arrived.pop(op, None) if self._arrived else None
            while found is None:
                arrived, number, form = self._arrive(peer)
                if arrived == op:
                    found = number, form
                else:
                    self._arrived[arrived] = number, form
        except (ConnectionError, TimeoutError) as error:
            raise self._lost(peer, op, error) from error
        number, form = found
        if number < 0:
            return form.opened(memoryview(b""))
        slot = peer.theirs[number]
        view = slot.memory[: form.num_bytes]
        slot.held = weakref.ref(view, slot.let_go)
        return form.opened(view)

    def finish(self) -> None:
        left = [*self._arrived, *(op for peer in self._peers.values() for op, _, _ in peer.expected)]
        assert not left, f"never taken: {[str(op) for op in left]}"

    def _arrive(self, peer: _Peer) -> tuple[Recv, int, _Form]:
        """The next parcel of this step from a peer: what it is for, its slot, and how it lies there."""
        while not peer.inbox:
            if not self._read(peer):
                self._wait(peer, select.POLLIN)
        message, (expected, name, key) = peer.inbox.popleft(), peer.expected.popleft()
        if not message.startswith(name):
            source, target, microbatch, payload = _OP.unpack_from(message)
            sent = Recv(source, target, microbatch, _PAYLOADS[payload])
            raise ScheduleError(
                f"mis-pairing: rank {peer.rank} sent for {sent}, and rank {self._rank} expects {expected}"
            )
        if len(message) > _HEAD_BYTES:
            self._known[key] = _Form(pickle.loads(memoryview(message)[_HEAD_BYTES:]))
        return expected, _SLOT.unpack_from(message, _OP.size)[0], self._known[key]

    def _lost(self, peer: _Peer, op: Send | Recv, error: OSError) -> PeerError:
        return PeerError(
            f"rank {self._rank} lost rank {peer.rank} in {op} (microbatch {op.microbatch}): {error}"
        )

    def _slot(self, peer: _Peer, size: int) -> tuple[int, _Slot]:
        """A slot that is free, and its number; always the first, because it may still be in a cache."""
        for of_size in (peer.of_size[size], peer.of_size[2 * size]):
            for number, slot in of_size:
                if not slot.flags[slot.number]:
                    return number, slot
        file = _memory_file(mmap.PAGESIZE + _SLOTS_PER_FILE * size)
        try:
            made = _slots_in(file, size)
            self._tell(peer, _NEW_FILE + _BYTES.pack(size))
            self._tell(peer, b"file", file)
        finally:
            os.close(file)
        peer.of_size[size] += enumerate(made, len(peer.own))
        peer.own += made
        return len(peer.own) - len(made), made[0]

    def _tell(self, peer: _Peer, message: bytes, file: int | None = None) -> None:
        """Send a message; while the peer has no room for it, read what comes."""
        while True:
            try:
                if file is None:
                    peer.socket.send(message)
                else:
                    socket.send_fds(peer.socket, [message], [file])
            except BlockingIOError:
                self._wait(peer, select.POLLIN | select.POLLOUT)
                self._read(peer)
            else:
                return

    def _reached_by(self, peer: _Peer) -> int:
        """How many receives from this rank the peer's program has reached."""
        while peer.their_board is None:
            self._wait(peer, select.POLLIN)
            self._read(peer)
        return peer.their_board[0]

    def _await_program(self, peer: _Peer) -> None:
        """Wait until the peer's program is less far behind; read what comes meanwhile."""
        poll = select.poll()
        poll.register(peer.socket, select.POLLIN)
        for _ in range(1 + int(self._timeout_seconds * 1e3 / _LOOKS_EVERY_MS)):
            if peer.num_sent - self._reached_by(peer) < _MOST_AHEAD:
                return
            if self._timeout_seconds and poll.poll(_LOOKS_EVERY_MS):
                self._read(peer)
        raise self._timeout()

    def _wait(self, peer: _Peer, events: int) -> None:
        """Wait until something has come, perhaps from others: that is read, as they may wait for it."""
        poll = select.poll()
        poll.register(peer.socket, events)
        others = {p.socket.fileno(): p for p in self._peers.values() if p is not peer and not p.has_ended}
        for number in others:
            poll.register(number, select.POLLIN)
        ready = poll.poll(min(self._timeout_seconds * 1e3, 2**31 - 1))
        if not ready:
            raise self._timeout()
        for number, _ in ready:
            if number in others:
                try:
                    self._read(others[number])
                except ConnectionError:  # who takes from it will hear of that
                    others[number].has_ended = True

    def _timeout(self) -> TimeoutError:
        return TimeoutError(f"waited {self._timeout_seconds:g} s")

    def _read(self, peer: _Peer) -> bool:
        """Read a message of a peer; whether there was one."""
        if peer.their_board is None:
            file = _received_file(peer.socket)
            if file is None:
                return False
            with _closing(file):
                peer.their_board = _board_in(file)
            return True
        try:
            message = peer.socket.recv(_LARGEST_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # once, if it has ended without reading all; what it sent is there
            return self._read(peer)
        if not message:
            raise ConnectionResetError("its process or its pipeline has ended")
        if message.startswith(_NEW_FILE):
            (size,) = _BYTES.unpack_from(message, len(_NEW_FILE))
            while (file := _received_file(peer.socket)) is None:
                self._wait(peer, select.POLLIN)
            with _closing(file):
                peer.theirs += _slots_in(file, size)
        else:
            peer.inbox.append(message)
        return True


def _name(op: Send | Recv) -> bytes:
    """How messages name a transfer, at both of its ends."""
    return _OP.pack(op.source, op.target, op.microbatch, _PAYLOADS.index(op.payload))


def _received_file(connection: socket.socket) -> int | None:
    """The open file that comes with the next message; None if there is no message yet."""
    try:
        message, files, _, _ = socket.recv_fds(connection, 16, 1)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return _received_file(connection)
    if not message:
        raise ConnectionResetError("its process or its pipeline has ended")
    if not files:
        raise _too_many_files()
    return files[0]


def _sent_board(connection: socket.socket) -> memoryview:
    """A new board, shown to the peer."""
    file = _memory_file(mmap.PAGESIZE)
    with _closing(file):
        with contextlib.suppress(ConnectionError):  # who waits for the peer will hear of it
            socket.send_fds(connection, [b"board"], [file])
        return _board_in(file)


def _board_in(file: int) -> memoryview:
    return memoryview(_mapped(file, mmap.PAGESIZE)).cast("Q")


def _mapped(file: int, num_bytes: int) -> mmap.mmap:
    with _enough_files():
        return mmap.mmap(file, num_bytes)


def _memory_file(num_bytes: int) -> int:
    with _enough_files():
        file = os.memfd_create("evenflow")
    try:
        os.ftruncate(file, num_bytes)
    except BaseException:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def _enough_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _too_many_files() if error.errno == errno.EMFILE else error from None


@contextlib.contextmanager
def _closing(file: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(file)


def _slots_in(file: int, size: int) -> list[_Slot]:
    """The slots of a file: a page of flags, and the slots behind it."""
    whole = memoryview(_mapped(file, mmap.PAGESIZE + _SLOTS_PER_FILE * size))
    flags = whole[:_SLOTS_PER_FILE]
    starts = (mmap.PAGESIZE + number * size for number in range(_SLOTS_PER_FILE))
    return [_Slot(whole[start : start + size], flags, number) for number, start in enumerate(starts)]


def _too_many_tensors(op: Send, number: int) -> ConfigError:
    return ConfigError(
        f"stage {op.source} hands {number} tensors at once to stage {op.target}, more than a message between "
        "two ranks can tell of: cut the model where fewer tensors cross"
    )


def _too_many_files() -> ConfigError:
    return ConfigError(
        "this process may have no more files open, and sixteen parcels in flight between two ranks need one: "
        "raise the limit (ulimit -n), or use fewer microbatches"
    )


def _close(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()
