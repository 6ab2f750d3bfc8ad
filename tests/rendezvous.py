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
from evenflow.ir.placement import Placement
from evenflow.runtime.links.layout import Layout, pack, unpack
from evenflow.runtime.links.link import Link, Manifest, Parcel


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

    >>> meeting = Meeting(Placement.linear(2), timeout_seconds=10)
    >>> first, second = meeting.link(0), meeting.link(1)
    """

    def __init__(self, placement: Placement, *, timeout_seconds: float) -> None:
        self._placement = placement
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._standing: dict[int, list[_Stance]] = {}  # by rank, in the order in which they match
        self._left: set[int] = set()

    def link(self, rank: int) -> "RendezvousLink":
        """This rank's link."""
        assert 0 <= rank < self._placement.num_ranks, f"rank {rank} of {self._placement.num_ranks}"
        return RendezvousLink(self, rank)

    def leave(self, rank: int) -> None:
        """A rank will come to no further transfer; whoever waits for it gets a `PeerError` at once."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()

    def meet(self, rank: int, transfers: Sequence[tuple[Send | Recv, Parcel | None]]) -> list[Parcel | None]:
        """Stand in all these transfers at once until each has met its peer's opposite one.

        Returns the parcels that changed hands. Raises `ScheduleError` on both ranks when two ops that meet
        are not each other's, and `PeerError` when a peer has left or does not come in time.
        """
        stances = [_Stance(op, self._peer(op), parcel) for op, parcel in transfers]
        with self._changed:
            self._standing[rank] = list(stances)
            for mine in stances:
                self._pair_with(rank, mine.peer)
            self._changed.wait_for(lambda: self._is_over(stances), self._timeout_seconds)
            left = self._standing.pop(rank)
            if fault := next((mine.fault for mine in stances if mine.fault is not None), None):
                raise ScheduleError(fault)
            if left:
                lost = [mine for mine in left if mine.peer in self._left]
                raise PeerError(self._missed(rank, (lost or left)[0]))
            return [mine.parcel for mine in stances]

    def _peer(self, op: Send | Recv) -> int:
        return self._placement.rank_of[op.target if isinstance(op, Send) else op.source]

    def _is_over(self, stances: Sequence[_Stance]) -> bool:
        waiting = [mine for mine in stances if not mine.met]
        lost = any(mine.peer in self._left for mine in waiting)
        return lost or not waiting or any(mine.fault is not None for mine in stances)

    def _first(self, rank: int, peer: int, kind: type[Send] | type[Recv]) -> _Stance | None:
        """The transfer of a kind that is next between `rank`, which stands in it, and `peer`."""
        standing = self._standing.get(rank, ())
        return next((one for one in standing if one.peer == peer and isinstance(one.op, kind)), None)

    def _pair_with(self, rank: int, peer: int) -> None:
        """Let whatever can meet between two ranks meet."""
        for source, target in ((rank, peer), (peer, rank)):
            while True:
                send, recv = self._first(source, target, Send), self._first(target, source, Recv)
                if send is None or recv is None:
                    break
                if _opposite(send.op) != recv.op:
                    fault = f"mis-pairing: {send.op} on rank {source} meets {recv.op} on rank {target}"
                    send.fault = recv.fault = fault
                recv.parcel = send.parcel
                send.met = recv.met = True
                self._standing[source].remove(send)
                self._standing[target].remove(recv)
                self._changed.notify_all()

    def _missed(self, rank: int, mine: _Stance) -> str:
        what = "activations" if mine.op.payload is Payload.ACTIVATION else "gradients"
        where = (
            f"rank {rank} in {mine.op} ({what} of microbatch {mine.op.microbatch}, stage {mine.op.source} to "
            f"stage {mine.op.target})"
        )
        if mine.peer in self._left:
            return f"{where} lost rank {mine.peer}, which has left"
        stances = [f"{stance.op} with rank {stance.peer}" for stance in self._standing.get(mine.peer, ())]
        place = f"stands in {' and '.join(stances)}" if stances else "is in no transfer"
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
        self._stand([(op, _copies(parcel, manifest))], [])

    def post(self, op: Recv) -> None:
        self._stand([], [op])

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        self._stand([(op, _copies(parcel, manifest)) for op, parcel, manifest in sends], receives)

    def _stand(self, sends: Sequence[tuple[Send, Parcel]], receives: Sequence[Recv]) -> None:
        for op in receives:
            expected = self._expected.popleft()
            assert expected == op, f"{op} where the program has {expected}"
        parcels = self._meeting.meet(self._rank, [*sends, *((op, None) for op in receives)])
        for op, parcel in zip(receives, parcels[len(sends) :], strict=True):
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


def _copies(parcel: Parcel, manifest: Manifest) -> Parcel:
    return tuple(None if tensor is None else _copy(tensor, manifest.device) for tensor in parcel)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in memory of its own, as on another rank, at the same strides."""
    layout = Layout.of(tensor)
    return unpack(pack(tensor, layout).to(device, copy=True), layout)
