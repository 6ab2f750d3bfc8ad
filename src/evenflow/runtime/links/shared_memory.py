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
import mmap
import pickle
import select
import socket
import struct
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from evenflow.errors import ConfigError, PeerError, ScheduleError
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.runtime.links.layout import Layout
from evenflow.runtime.links.link import Link, Manifest, Parcel
from evenflow.runtime.links.slots import (
    Form,
    Slot,
    board_in,
    closing,
    file_of_slots,
    memory_file,
    slots_in,
    too_many_files,
)

_LARGEST_MESSAGE_BYTES = 2**17
_MOST_AHEAD = 16  # parcels for receives that the peer's program has perhaps not reached
_LONGEST_SECONDS = 1e6  # that the system can wait
_LOOKS_EVERY_SECONDS = 1e-3  # at how far the peer's program is, while a send waits for that

# A message: the op that it is for, then the slot (-1: the parcel is empty). Behind that stand, pickled, the
# parcel's layouts, where they are not those of the last parcel of its key. A message that begins with
# `_NEW_FILE` instead says how large each slot of a file is, which comes with the next.
_OP = struct.Struct("<4i")  # source, target, microbatch, payload
_SLOT = struct.Struct("<i")
_NEW_FILE, _BYTES = struct.pack("<4i", -1, -1, -1, -1), struct.Struct("<q")
_PAYLOADS = tuple(Payload)
_HEAD_BYTES = _OP.size + _SLOT.size


@dataclass
class _Peer:
    """One end of the connection with another rank."""

    rank: int
    socket: socket.socket
    board: memoryview  # how many receives from the peer this rank's program has reached, for it to see
    their_board: memoryview | None = None  # the same of the peer, which sends it first of all
    announced_bytes: int | None = None  # how large each slot is of the file that comes next
    num_sent: int = 0
    own: list[Slot] = field(default_factory=list)  # that this rank fills, by number
    of_size: defaultdict[int, list[tuple[int, Slot]]] = field(default_factory=partial(defaultdict, list))
    theirs: list[Slot] = field(default_factory=list)  # that the peer fills, by number
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
        self._by_file = {peer.socket.fileno(): peer for peer in self._peers.values()}
        self._arrivals = select.epoll()  # made once: between two ops no code is warm
        for each in sockets.values():
            each.setblocking(False)
            self._arrivals.register(each, select.EPOLLIN)
        weakref.finalize(self, _close, [self._arrivals, *sockets.values()])
        self._told: dict[tuple[Any, ...], Form] = {}  # by the parcel's key
        self._known: dict[tuple[Any, ...], Form] = {}
        self._arrived: dict[Recv, tuple[int, Form]] = {}  # the slot, and what is in it

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
                form = Form(tuple(None if tensor is None else Layout.of(tensor) for tensor in parcel))
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

    def _arrive(self, peer: _Peer) -> tuple[Recv, int, Form]:
        """The next parcel of this step from a peer: what it is for, its slot, and how it lies there."""
        while not peer.inbox:
            if not self._read(peer):
                self._wait(peer)
        message, (expected, name, key) = peer.inbox.popleft(), peer.expected.popleft()
        if not message.startswith(name):
            source, target, microbatch, payload = _OP.unpack_from(message)
            sent = Recv(source, target, microbatch, _PAYLOADS[payload])
            raise ScheduleError(
                f"mis-pairing: rank {peer.rank} sent for {sent}, and rank {self._rank} expects {expected}"
            )
        if len(message) > _HEAD_BYTES:
            self._known[key] = Form(pickle.loads(memoryview(message)[_HEAD_BYTES:]))
        return expected, _SLOT.unpack_from(message, _OP.size)[0], self._known[key]

    def _lost(self, peer: _Peer, op: Send | Recv, error: OSError) -> PeerError:
        return PeerError(
            f"rank {self._rank} lost rank {peer.rank} in {op} (microbatch {op.microbatch}): {error}"
        )

    def _slot(self, peer: _Peer, size: int) -> tuple[int, Slot]:
        """A slot that is free, and its number; always the first, because it may still be in a cache."""
        for of_size in (peer.of_size[size], peer.of_size[2 * size]):
            for number, slot in of_size:
                if not slot.flags[slot.number]:
                    return number, slot
        with file_of_slots(size) as (file, made):
            self._tell(peer, _NEW_FILE + _BYTES.pack(size))
            self._tell(peer, b"file", file)
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
                self._await_room(peer)
                self._read(peer)
            else:
                return

    def _await_room(self, peer: _Peer) -> None:
        """Wait until the peer has room for a message, or something has come."""
        self._arrivals.modify(peer.socket, select.EPOLLIN | select.EPOLLOUT)
        try:
            self._wait(peer)
        finally:
            self._arrivals.modify(peer.socket, select.EPOLLIN)

    def _reached_by(self, peer: _Peer) -> int:
        """How many receives from this rank the peer's program has reached."""
        while peer.their_board is None:
            if not self._read(peer):
                self._wait(peer)
        return peer.their_board[0]

    def _await_program(self, peer: _Peer) -> None:
        """Wait until the peer's program is less far behind; read what comes meanwhile."""
        end = time.monotonic() + self._timeout_seconds
        while peer.num_sent - self._reached_by(peer) >= _MOST_AHEAD:
            if time.monotonic() > end:
                raise self._timeout()
            self._something_comes(peer, _LOOKS_EVERY_SECONDS)
            self._read(peer)

    def _wait(self, peer: _Peer) -> None:
        if not self._something_comes(peer, self._timeout_seconds):
            raise self._timeout()

    def _something_comes(self, peer: _Peer, seconds: float) -> bool:
        """Wait until something has come, perhaps from others: that is read, as they may wait for it."""
        ready = self._arrivals.poll(min(seconds, _LONGEST_SECONDS))
        for file, _ in ready:
            other = self._by_file[file]
            if other is not peer:
                try:
                    self._read(other)
                except ConnectionError:  # who takes from it will hear of that
                    self._arrivals.unregister(file)
        return bool(ready)

    def _timeout(self) -> TimeoutError:
        return TimeoutError(f"waited {self._timeout_seconds:g} s")

    def _read(self, peer: _Peer) -> bool:
        """Read a message of a peer; whether there was one."""
        if peer.their_board is None or peer.announced_bytes is not None:
            return self._read_file(peer)
        try:
            message = peer.socket.recv(_LARGEST_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # once, if it has ended without reading all; what it sent is there
            return self._read(peer)
        if not message:
            raise ConnectionResetError("its process or its pipeline has ended")
        if message.startswith(_NEW_FILE):
            (peer.announced_bytes,) = _BYTES.unpack_from(message, len(_NEW_FILE))
        else:
            peer.inbox.append(message)
        return True

    def _read_file(self, peer: _Peer) -> bool:
        """Read the message of a peer that brings its board, or a file of slots; whether there was one."""
        file = _received_file(peer.socket)
        if file is None:
            return False
        with closing(file):
            if peer.their_board is None:
                peer.their_board = board_in(file)
            elif peer.announced_bytes is not None:
                peer.theirs += slots_in(file, peer.announced_bytes)
                peer.announced_bytes = None
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
        raise too_many_files()
    return files[0]


def _sent_board(connection: socket.socket) -> memoryview:
    """A new board, shown to the peer."""
    file = memory_file(mmap.PAGESIZE)
    with closing(file):
        with contextlib.suppress(ConnectionError):  # who waits for the peer will hear of it
            socket.send_fds(connection, [b"board"], [file])
        return board_in(file)


def _too_many_tensors(op: Send, number: int) -> ConfigError:
    return ConfigError(
        f"stage {op.source} hands {number} tensors at once to stage {op.target}, more than a message between "
        "two ranks can tell of: cut the model where fewer tensors cross"
    )


def _close(files: Sequence[socket.socket | select.epoll]) -> None:
    for each in files:
        each.close()
