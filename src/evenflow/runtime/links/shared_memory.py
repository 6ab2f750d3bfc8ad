"""SharedMemoryLink: parcels between processes of one host, with one copy.

A sender copies a parcel into a *slot*, a piece of memory that both processes have mapped, and tells the
receiver so over a Unix socket. What the receiver takes is the slot itself; when the last of its tensors is
gone, it says so, and the slot is used again. Slots are made as they are needed and handed over as open files
without a name: whatever ends a process, nothing of them is left behind. A message wakes who waits for it, so
no thread stands between two ranks and takes a processor from them, as Gloo's do: on two cores, one parcel
in ten then came 5 to 9 ms late (measured 2026-11-22).

A send waits only where the receiver's program is many receives behind, so that a fast rank does not fill the
host's memory.
"""

import contextlib
import math
import mmap
import os
import pickle
import select
import socket
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from evenflow.errors import PeerError, ScheduleError
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.runtime.inflight import Parcel
from evenflow.runtime.links.layout import Layout, unpack
from evenflow.runtime.links.link import Link, Manifest
from evenflow.runtime.world import TIMEOUT_SECONDS

_ALIGNED = 64  # bytes: each tensor begins where torch's own would
_LARGEST_MESSAGE = 2**17
_MOST_AHEAD = 16  # parcels for receives that the peer's program has perhaps not reached
_TOLD_EVERY = 8  # receives that this rank's program has reached, so that peers may go on

_Layouts = tuple[Layout | None, ...]


class _Sent(NamedTuple):
    """What a message says of a parcel; in plain fields, for pickle has more to say of classes.

    `layouts` where they are not those of the last parcel of its key. The slot of number `slot` holds it (none
    where it is empty); `new_bytes` if the slot's file comes with it.
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
    num_reached: int = 0  # receives that the peer was not told of
    own: list[mmap.mmap] = field(default_factory=list)  # slots that this rank fills
    free: list[int] = field(default_factory=list)  # of them
    theirs: dict[int, mmap.mmap] = field(default_factory=dict)  # slots that the peer fills
    inbox: deque[_Sent] = field(default_factory=deque)  # of this step, and perhaps already of the next
    expected: deque[Recv] = field(default_factory=deque)  # in the order in which the peer sends
    held: dict[int, weakref.ref[memoryview]] = field(default_factory=dict)  # of them, as last taken
    let_go: deque[int] = field(default_factory=deque)  # of them: nobody here holds it any more


class SharedMemoryLink(Link):
    """One rank's end; `sockets` lead to the other ranks (see `neighbours`), and are the link's own."""

    def __init__(self, placement: Placement, rank: int, sockets: Mapping[int, socket.socket]) -> None:
        self._rank_of, self._rank = placement.rank_of, rank
        self._peers = {rank: _Peer(rank, each) for rank, each in sockets.items()}
        for each in sockets.values():
            each.setblocking(False)
        weakref.finalize(self, _close, list(sockets.values()))
        self._buffer = bytearray(_LARGEST_MESSAGE)
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
        slot, new_bytes, file = None, 0, None
        try:
            self._drain(peer)
            while peer.num_ahead >= _MOST_AHEAD:
                self._await_message(peer)
            if num_bytes:
                slot, new_bytes, file = _slot(peer, num_bytes)
                for tensor, layout, place in zip(parcel, layouts, places, strict=True):
                    if tensor is not None and layout is not None and tensor.numel():
                        _fill(peer.own[slot], place, tensor.detach(), layout)
            told = None if self._told.get(manifest.key) == layouts else layouts
            self._told[manifest.key] = layouts
            sent = _Sent(op.source, op.target, op.microbatch, op.payload.value, told, slot, new_bytes)
            self._tell(peer, tuple(sent), file)
            peer.num_ahead += 1
        except OSError as error:
            raise self._lost(peer, op, error) from error
        finally:
            if file is not None:
                os.close(file)

    def post(self, op: Recv) -> None:
        peer = self._peers[self._rank_of[op.source]]
        peer.num_reached += 1
        if peer.num_reached == _TOLD_EVERY:
            peer.num_reached = 0
            self._tell_if_there(peer, -_TOLD_EVERY)

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        for op in receives:
            self.post(op)
        for send in sends:
            self.send(*send)

    def take(self, op: Recv) -> Parcel:
        peer = self._peers[self._rank_of[op.source]]
        self._give_back(peer)
        try:
            while op not in self._arrived:
                self._arrive(peer)
        except OSError as error:
            raise self._lost(peer, op, error) from error
        return self._opened(peer, *self._arrived.pop(op))

    def finish(self) -> None:
        left = [*self._arrived, *(op for peer in self._peers.values() for op in peer.expected)]
        assert not left, f"never taken: {[str(op) for op in left]}"
        for peer in self._peers.values():
            self._give_back(peer)

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
            view = memoryview(peer.theirs[slot])[:num_bytes]
            peer.held[slot] = weakref.ref(view, lambda _: peer.let_go.append(slot))
        return tuple(
            None if layout is None else unpack(_block(view, place, layout), layout)
            for layout, place in zip(layouts, places, strict=True)
        )

    def _give_back(self, peer: _Peer) -> None:
        while peer.let_go:
            self._tell_if_there(peer, peer.let_go.popleft())

    def _tell_if_there(self, peer: _Peer, message: int) -> None:
        """Tell what a peer needs to send more; one that has sent all may have ended."""
        with contextlib.suppress(OSError):
            self._tell(peer, message)

    def _lost(self, peer: _Peer, op: Send | Recv, error: OSError) -> PeerError:
        return PeerError(
            f"rank {self._rank} lost rank {peer.rank} in {op} (microbatch {op.microbatch}): {error}"
        )

    def _tell(self, peer: _Peer, message: tuple[Any, ...] | int, file: int | None = None) -> None:
        """Send what a `_Sent` holds, or a slot's number to give it back, or -n for n receives reached.

        While the peer has no room for it, read what comes.
        """
        packed = pickle.dumps(message)
        assert len(packed) <= _LARGEST_MESSAGE, f"a parcel of {len(packed)} bytes of layouts"
        while True:
            try:
                socket.send_fds(peer.socket, [packed], [] if file is None else [file])
                return
            except BlockingIOError:
                _wait(peer, select.POLLIN | select.POLLOUT)
                self._drain(peer)

    def _await_message(self, peer: _Peer) -> None:
        if peer.has_ended:
            raise ConnectionResetError("its process or its pipeline has ended")
        _wait(peer, select.POLLIN)
        self._drain(peer)

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
            if isinstance(message, int):
                if message < 0:
                    peer.num_ahead += message
                else:
                    peer.free.append(message)
                continue
            sent = _Sent(*message)
            if sent.new_bytes:
                assert sent.slot is not None
                file = int.from_bytes(extras[0][2], sys.byteorder)
                peer.theirs[sent.slot] = mmap.mmap(file, sent.new_bytes)
                os.close(file)
            peer.inbox.append(sent)


def _wait(peer: _Peer, events: int) -> None:
    poll = select.poll()
    poll.register(peer.socket, events)
    if not poll.poll(TIMEOUT_SECONDS * 1e3):
        raise TimeoutError(f"waited {TIMEOUT_SECONDS:g} s")


def _places(layouts: _Layouts) -> tuple[tuple[int, ...], int]:
    """Where in its slot each tensor begins, and how many bytes all of them take."""
    places, end = [], 0
    for layout in layouts:
        places.append(end)
        size = 0 if layout is None else math.prod(layout.shape) * layout.dtype.itemsize
        end += -(-size // _ALIGNED) * _ALIGNED
    return tuple(places), end


def _slot(peer: _Peer, num_bytes: int) -> tuple[int, int, int | None]:
    """A slot that is free: its number, and its size and file where it is new.

    Sizes are powers of two, so that parcels of all sizes share few; pages that nobody wrote take no memory.
    """
    capacity = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
    for place, number in enumerate(peer.free):
        if len(peer.own[number]) == capacity:
            del peer.free[place]
            return number, 0, None
    file = os.memfd_create("evenflow")
    os.ftruncate(file, capacity)
    peer.own.append(mmap.mmap(file, capacity))
    return len(peer.own) - 1, capacity, file


def _fill(slot: mmap.mmap, place: int, tensor: torch.Tensor, layout: Layout) -> None:
    """Copy a tensor's elements to a place, in the order of its layout."""
    block = torch.frombuffer(slot, dtype=layout.dtype, count=tensor.numel(), offset=place)
    block.view([layout.shape[d] for d in layout.order]).copy_(tensor.permute(layout.order))


def _block(view: memoryview, place: int, layout: Layout) -> torch.Tensor:
    """The flat block that a tensor travelled as."""
    number = math.prod(layout.shape)
    block = torch.empty(0, dtype=layout.dtype)
    if number:
        there = torch.frombuffer(view, dtype=layout.dtype, count=number, offset=place).untyped_storage()
        block.set_(there, 0, (number,), (1,))  # a kernel, so that who counts memory (`cost.storages`) sees it
    return block


def _close(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()
