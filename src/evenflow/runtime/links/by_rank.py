"""LinkByRank: one link to some ranks, another to all others."""

from collections.abc import Iterable, Mapping, Sequence

from evenflow.ir.op import Recv, Send
from evenflow.ir.placement import Placement
from evenflow.runtime.links.link import Link, Manifest, Parcel


class LinkByRank(Link):
    """Hands each transfer to the link of the rank at its other end: in `links`, or `other`."""

    def __init__(self, placement: Placement, links: Mapping[int, Link], other: Link) -> None:
        self._links = tuple(links.get(rank, other) for rank in range(placement.num_ranks))
        self._rank_of = placement.rank_of
        self.receives_ahead = max(link.receives_ahead for link in self._each())
        self.sends_ahead = max(link.sends_ahead for link in self._each())

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        for link in self._each():
            link.start([each for each in receives if self._of(each[0]) is link])

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        self._of(op).send(op, parcel, manifest)

    def post(self, op: Recv) -> None:
        self._of(op).post(op)

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        for link in self._each():
            link.exchange(
                [send for send in sends if self._of(send[0]) is link],
                [op for op in receives if self._of(op) is link],
            )

    def take(self, op: Recv) -> Parcel:
        return self._of(op).take(op)

    def finish(self) -> None:
        for link in self._each():
            link.finish()

    def _of(self, op: Send | Recv) -> Link:
        return self._links[self._rank_of[op.target if isinstance(op, Send) else op.source]]

    def _each(self) -> Iterable[Link]:
        return dict.fromkeys(self._links)
