"""RendezvousLink: the worst machine that a program must live on, between threads of one process; for tests.

It behaves as NCCL is allowed to: no buffers, no tags, one serial queue per rank. A send ends only when the
peer stands in a receive from this rank, and both match by order, whatever they carry. That is the machine on
which `validate.prove` runs a program on paper; here real tensors travel over it.

Where NCCL would hand a parcel to the wrong receive without a word, both ranks get a `ScheduleError` that
names the two ops: delivering it could go unseen when shapes agree. And where NCCL would wait for ever, a rank
waits for a bounded time and then says for whom, in which op, and where that peer stands instead.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evenflow.errors import PeerError, ScheduleError
from evenflow.ir.op import Payload, Recv, Send
from evenflow.runtime.inflight import Parcel
from evenflow.runtime.links.layout import Layout, pack, unpack
from evenflow.runtime.links.link import Link, Manifest


@dataclass(slots=True, eq=False)
class _Stance:
    """A rank that stands in a transfer: the op, what it brings, and what became of it."""

    op: Send | Recv
    peer: int
    parcel: Parcel | None  # what a send brings and what a receive takes away
    met: bool = False
    fault: str | None = None


class Meeting:
    """Where the ranks of one process meet, each in a thread of its own; makes one link for each.

    `timeout_seconds` bounds every wait. A rank whose thread ends early must `leave`, so that its peers
    need not wait so long.

    >>> meeting = Meeting(num_ranks=2, timeout_seconds=10)
    >>> first, second = meeting.link(0), meeting.link(1)
    """

    def __init__(self, num_ranks: int, *, timeout_seconds: float) -> None:
        self._num_ranks = num_ranks
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._standing: dict[int, _Stance] = {}
        self._left: set[int] = set()

    def link(self, rank: int) -> "RendezvousLink":
        """This rank's link. Stage s is on rank s."""
        assert 0 <= rank < self._num_ranks, f"rank {rank} of {self._num_ranks}"
        return RendezvousLink(self, rank)

    def leave(self, rank: int) -> None:
        """A rank will come to no further transfer; whoever waits for it gets a `PeerError` at once."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def meet(self, rank: int, op: Send | Recv, peer: int, parcel: Parcel | None) -> Parcel | None:
        """Stand in `op` until the peer stands in the opposite transfer with this rank.

        Returns the parcel that changed hands. Raises `ScheduleError` on both ranks when the two ops are
        not each other's, and `PeerError` when the peer has left or does not come in time.
        """
        mine = _Stance(op, peer, parcel)
        with self._changed:
            self._standing[rank] = mine
            other = self._standing.get(peer)
            if other is not None and other.peer == rank and type(other.op) is not type(op):
                self._pair(rank, mine, peer, other)
            else:
                self._changed.wait_for(lambda: mine.met or peer in self._left, self._timeout_seconds)
                if not mine.met:
                    del self._standing[rank]
                    raise PeerError(self._missed(rank, mine))
            if mine.fault is not None:
                raise ScheduleError(mine.fault)
            return mine.parcel

    def _pair(self, rank: int, mine: _Stance, peer: int, other: _Stance) -> None:
        (source, send), (target, recv) = sorted(
            ((rank, mine), (peer, other)), key=lambda stance: isinstance(stance[1].op, Recv)
        )
        if _opposite(send.op) != recv.op:
            fault = f"mis-pairing: {send.op} on rank {source} meets {recv.op} on rank {target}"
            mine.fault = other.fault = fault
        recv.parcel = send.parcel
        mine.met = other.met = True
        del self._standing[rank], self._standing[peer]
        self._changed.notify_all()

    def _missed(self, rank: int, mine: _Stance) -> str:
        what = "activations" if mine.op.payload is Payload.ACTIVATION else "gradients"
        where = (
            f"rank {rank} in {mine.op} ({what} of microbatch {mine.op.microbatch}, stage {mine.op.source} to "
            f"stage {mine.op.target})"
        )
        if mine.peer in self._left:
            return f"{where} lost rank {mine.peer}, which has left"
        stance = self._standing.get(mine.peer)
        place = "is in no transfer" if stance is None else f"stands in {stance.op} with rank {stance.peer}"
        return f"{where} waited {self._timeout_seconds:g} s for rank {mine.peer}, which {place}"


class RendezvousLink(Link):
    """One rank's end of a `Meeting`; used by that rank's thread alone."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank
        self._expected: deque[Recv] = deque()  # receives that the program has not reached, in its order
        self._arrived: dict[Recv, Parcel] = {}

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        self._expected = deque(op for op, _ in receives)
        self._arrived.clear()

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        copies = tuple(None if tensor is None else _copy(tensor, manifest.device) for tensor in parcel)
        self._meeting.meet(self._rank, op, op.target, copies)

    def post(self, op: Recv) -> None:
        expected = self._expected.popleft()
        assert expected == op, f"{op} where the program has {expected}"
        parcel = self._meeting.meet(self._rank, op, op.source, None)
        assert parcel is not None, "a send brings a parcel"
        self._arrived[op] = parcel

    def take(self, op: Recv) -> Parcel:
        return self._arrived.pop(op)

    def finish(self) -> None:
        left = (*self._arrived, *self._expected)
        assert not left, f"never taken: {[str(op) for op in left]}"


def _opposite(op: Send | Recv) -> Send | Recv:
    kind = Recv if isinstance(op, Send) else Send
    return kind(op.source, op.target, op.microbatch, op.payload)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in memory of its own, as on another rank, at the same strides."""
    layout = Layout.of(tensor)
    return unpack(pack(tensor, layout).to(device, copy=True), layout)
