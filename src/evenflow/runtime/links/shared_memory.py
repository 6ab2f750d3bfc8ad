"""SharedMemoryLink: parcels between processes of one host, with one copy.

A sender copies a parcel into a *slot*, a piece of memory that both processes have mapped, and tells the
receiver so over a Unix socket. What the receiver takes is the slot itself; when the last of its tensors is
gone, it says so, and the slot is used again. Slots are made as they are needed and handed over as open files
without a name: whatever ends a process, nothing of them is left behind. A message wakes who waits for it, so
no thread stands between two ranks and takes a processor from them, as Gloo's do: on two cores, one parcel
in ten then came 5 to 9 ms late (measured 2026-11-22).

A send waits only where the receiver's program is about sixteen receives behind, so that a fast rank does not
fill the host's memory.
"""

import contextlib
import errno
import math
import mmap
import os
import pickle
import select
import socket
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
_TOLD_EVERY = 8  # receives that this rank's program has reached, so that peers may go on
_SLOTS_PER_FILE = 16  # a process may have a thousand files open; what nobody has written takes no memory

_Layouts = tuple[Layout | None, ...]


class _Sent(NamedTuple):
    """What a message says of a parcel; in plain fields, for pickle has more to say of classes.

    `layouts` where they are not those of the last parcel of its key. The slot of number `slot` holds it (none
    where it is empty); `new_bytes` is the size of each slot of the file that comes with it, if one does.
    """

    source: int
    target: int
    microbatch: int
    payload: str
    layouts: _Layouts | None
    slot: int | None
    new_bytes: int

    @property
    def op(self) -> Recv:
        """The receive that it is for."""
        return Recv(self.source, self.target, self.microbatch, Payload(self.payload))


@dataclass
class _Peer:
    """One end of the connection with another rank."""

    rank: int
    socket: socket.socket
    has_ended: bool = False
    num_ahead: int = 0  # parcels sent for receives that the peer has not told of
    own: list[memoryview] = field(default_factory=list)  # slots that this rank fills
    free: defaultdict[int, list[int]] = field(default_factory=partial(defaultdict, list))  # of them, by size
    theirs: list[memoryview] = field(default_factory=list)  # slots that the peer fills
    held: dict[int, weakref.ref[memoryview]] = field(default_factory=dict)  # of them, as last taken
    inbox: deque[_Sent] = field(default_factory=deque)  # of this step, and perhaps already of the next
    expected: deque[Recv] = field(default_factory=deque)  # in the order in which the peer sends
    # What the peer was not told: how many more receives were reached, and which of its slots are let go of.
    num_reached: int = 0
    let_go: deque[int] = field(default_factory=deque)


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
        self._peers = {rank: _Peer(rank, each) for rank, each in sockets.items()}
        for each in sockets.values():
            each.setblocking(False)
        weakref.finalize(self, _close, list(sockets.values()))
        self._buffer = bytearray(_LARGEST_MESSAGE_BYTES)
        self._told: dict[tuple[Any, ...], _Layouts] = {}  # by the parcel's key
        self._known: dict[tuple[Any, ...], _Layouts] = {}
        self._manifests: dict[Recv, Manifest] = {}
        self._arrived: dict[Recv, tuple[int | None, _Layouts]] = {}  # the slot, and what is in it

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        self._manifests = dict(receives)
        for peer in self._peers.values():
            peer.expected = deque(op for op, _ in receives if self._rank_of[op.source] == peer.rank)

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        peer = self._peers[self._rank_of[op.target]]
        layouts = tuple(None if tensor is None else Layout.of(tensor) for tensor in parcel)
        places, num_bytes = _places(layouts)
        try:
            self._drain(peer)
            while peer.num_ahead >= _MOST_AHEAD:
                self._await_message(peer)
        except (ConnectionError, TimeoutError) as error:
            raise self._lost(peer, op, error) from error
        with contextlib.ExitStack() as stack:
            slot, new_bytes, file = _slot(peer, num_bytes) if num_bytes else (None, 0, None)
            if file is not None:
                stack.callback(os.close, file)
            for tensor, layout, place in zip(parcel, layouts, places, strict=True):
                if slot is not None and tensor is not None and layout is not None and tensor.numel():
                    _fill(peer.own[slot], place, tensor.detach(), layout)
            told = None if self._told.get(manifest.key) == layouts else layouts
            self._told[manifest.key] = layouts
            sent = _Sent(op.source, op.target, op.microbatch, op.payload.value, told, slot, new_bytes)
            self._tell(peer, op, sent, file)
        peer.num_ahead += 1

    def post(self, op: Recv) -> None:
        peer = self._peers[self._rank_of[op.source]]
        peer.num_reached += 1
        if peer.num_reached >= _TOLD_EVERY:
            self._tell_news(peer)

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        for op in receives:
            self.post(op)
        for send in sends:
            self.send(*send)

    def take(self, op: Recv) -> Parcel:
        peer = self._peers[self._rank_of[op.source]]
        try:
            if peer.let_go:
                self._tell_news(peer)
            while op not in self._arrived:
                self._arrive(peer)
        except (ConnectionError, TimeoutError) as error:
            raise self._lost(peer, op, error) from error
        return self._opened(peer, *self._arrived.pop(op))

    def finish(self) -> None:
        left = [*self._arrived, *(op for peer in self._peers.values() for op in peer.expected)]
        assert not left, f"never taken: {[str(op) for op in left]}"
        for peer in self._peers.values():
            self._tell_news(peer)

    def _arrive(self, peer: _Peer) -> None:
        """Let the next parcel of this step arrive from a peer."""
        self._drain(peer)
        while not peer.inbox:
            self._await_message(peer)
        sent, expected = peer.inbox.popleft(), peer.expected.popleft()
        if sent.op != expected:
            raise ScheduleError(
                f"mis-pairing: rank {peer.rank} sent for {sent.op}, and rank {self._rank} expects {expected}"
            )
        key = self._manifests[expected].key
        if sent.layouts is not None:
            self._known[key] = sent.layouts
        self._arrived[expected] = sent.slot, self._known[key]

    def _opened(self, peer: _Peer, slot: int | None, layouts: _Layouts) -> Parcel:
        """The tensors in a slot, which is given back when the last of them is gone."""
        places, num_bytes = _places(layouts)
        view = memoryview(b"")
        if slot is not None:
            view = peer.theirs[slot][:num_bytes]
            peer.held[slot] = weakref.ref(view, lambda _: peer.let_go.append(slot))
        return tuple(
            None if layout is None else unpack(_block(view, place, layout), layout)
            for layout, place in zip(layouts, places, strict=True)
        )

    def _lost(self, peer: _Peer, op: Send | Recv, error: OSError) -> PeerError:
        return PeerError(
            f"rank {self._rank} lost rank {peer.rank} in {op} (microbatch {op.microbatch}): {error}"
        )

    def _tell(self, peer: _Peer, op: Send, sent: _Sent, file: int | None) -> None:
        """Tell of a parcel; while the peer has no room for the message, read what comes."""
        packed = pickle.dumps(tuple(sent))
        if len(packed) > _LARGEST_MESSAGE_BYTES:
            raise ConfigError(
                f"stage {op.source} hands {len(sent.layouts or ())} tensors at once to stage {op.target}, "
                "more than a message between two ranks can tell of: cut the model where fewer tensors cross"
            )
        try:
            while not _has_sent(peer, packed, file):
                self._wait(peer, select.POLLIN | select.POLLOUT)
                self._drain(peer)
        except (ConnectionError, TimeoutError) as error:
            raise self._lost(peer, op, error) from error

    def _tell_news(self, peer: _Peer) -> None:
        """Tell a peer what it needs to send more, if it has room now; one that has sent all may be gone."""
        self._drain(peer)
        slots = [peer.let_go.popleft() for _ in range(len(peer.let_go))]
        if not (peer.num_reached or slots):
            return
        with contextlib.suppress(ConnectionError):
            if _has_sent(peer, pickle.dumps([peer.num_reached, slots]), None):
                peer.num_reached = 0
            else:
                peer.let_go.extend(slots)

    def _await_message(self, peer: _Peer) -> None:
        if peer.has_ended:
            raise ConnectionResetError("its process or its pipeline has ended")
        untold = peer.num_reached >= _TOLD_EVERY
        self._wait(peer, select.POLLIN | (select.POLLOUT if untold else 0))
        if untold:
            self._tell_news(peer)
        self._drain(peer)

    def _wait(self, peer: _Peer, events: int) -> None:
        poll = select.poll()
        poll.register(peer.socket, events)
        if not poll.poll(self._timeout_seconds * 1e3):
            raise TimeoutError(f"waited {self._timeout_seconds:g} s")

    def _drain(self, peer: _Peer) -> None:
        """Read all that has come from a peer."""
        while True:
            try:
                size, extras, _, _ = peer.socket.recvmsg_into([self._buffer], socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            except ConnectionResetError:  # once, if it has ended without reading all; what it sent is there
                continue
            if not size:
                peer.has_ended = True
                return
            message = pickle.loads(memoryview(self._buffer)[:size])
            if isinstance(message, list):
                num_reached, slots = message
                peer.num_ahead -= num_reached
                for slot in slots:
                    peer.free[len(peer.own[slot])].append(slot)
                continue
            sent = _Sent(*message)
            if sent.new_bytes:
                if not extras:
                    raise _too_many_files()
                file = int.from_bytes(extras[0][2], sys.byteorder)
                try:
                    peer.theirs += _slots_in(file, sent.new_bytes)
                finally:
                    os.close(file)
            peer.inbox.append(sent)


def _has_sent(peer: _Peer, packed: bytes, file: int | None) -> bool:
    """Send a message, unless the peer has no room for it."""
    try:
        socket.send_fds(peer.socket, [packed], [] if file is None else [file])
    except BlockingIOError:
        return False
    return True


def _too_many_files() -> ConfigError:
    return ConfigError(
        "this process may have no more files open, and sixteen parcels in flight between two ranks need one: "
        "raise the limit (ulimit -n), or use fewer microbatches"
    )


def _places(layouts: _Layouts) -> tuple[tuple[int, ...], int]:
    """Where in its slot each tensor begins, and how many bytes all of them take."""
    places, end = [], 0
    for layout in layouts:
        places.append(end)
        size = 0 if layout is None else math.prod(layout.shape) * layout.dtype.itemsize
        end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return tuple(places), end


def _slot(peer: _Peer, num_bytes: int) -> tuple[int, int, int | None]:
    """A slot that is free: its number; and if it is in a new file, the size of each slot there, and the file.

    Sizes are powers of two, so that parcels of like sizes share slots. The last that became free comes first,
    because it may still be in a cache.
    """
    size = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
    for free in (peer.free[size], peer.free[2 * size]):
        if free:
            return free.pop(), 0, None
    try:
        file = os.memfd_create("evenflow")
    except OSError as error:
        raise _too_many_files() if error.errno == errno.EMFILE else error from None
    try:
        os.ftruncate(file, _SLOTS_PER_FILE * size)
        peer.own += _slots_in(file, size)
    except BaseException:
        os.close(file)
        raise
    peer.free[size] += range(len(peer.own) - _SLOTS_PER_FILE, len(peer.own))
    return peer.free[size].pop(), size, file


def _slots_in(file: int, size: int) -> list[memoryview]:
    whole = memoryview(mmap.mmap(file, _SLOTS_PER_FILE * size))
    return [whole[number * size : (number + 1) * size] for number in range(_SLOTS_PER_FILE)]


def _fill(slot: memoryview, place: int, tensor: torch.Tensor, layout: Layout) -> None:
    """Copy a tensor's elements to a place, in the order of its layout."""
    block = torch.frombuffer(slot, dtype=layout.dtype, count=tensor.numel(), offset=place)
    block.view([layout.shape[d] for d in layout.order]).copy_(tensor.permute(layout.order))


def _block(view: memoryview, place: int, layout: Layout) -> torch.Tensor:
    """The flat block that a tensor travelled as."""
    number = math.prod(layout.shape)
    block = torch.empty(0, dtype=layout.dtype, device="cpu")
    if number:
        there = torch.frombuffer(view, dtype=layout.dtype, count=number, offset=place).untyped_storage()
        block.set_(there, 0, (number,), (1,))  # a kernel, so that who counts memory (`cost.storages`) sees it
    return block


def _close(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()
