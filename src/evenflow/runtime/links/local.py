"""LocalLink: all ranks in one process. A parcel is handed over, or copied to the receiver's device."""

from collections.abc import Sequence

import torch

from evenflow.ir.op import Recv, Send
from evenflow.runtime.links.copies import Copied, Copies
from evenflow.runtime.links.link import Link, Manifest, Parcel


class LocalLink(Link):
    """One object shared by all ranks of the process."""

    def __init__(self) -> None:
        self._copies = Copies()
        self._under_way: dict[Recv, list[torch.Tensor | Copied | None]] = {}

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        self._under_way.clear()  # what a step that failed left behind

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        arrival = Recv(op.source, op.target, op.microbatch, op.payload)
        self._under_way[arrival] = [
            None if tensor is None else self._copies.begin(tensor, manifest.device) for tensor in parcel
        ]

    def post(self, op: Recv) -> None:
        assert op in self._under_way, f"{op} comes before its send: the order is not the proven one"

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        for op, parcel, manifest in sends:
            self.send(op, parcel, manifest)
        # What is received may be sent by a rank that has its turn after this one: `take` will see.

    def take(self, op: Recv) -> Parcel:
        return tuple(each.taken() if isinstance(each, Copied) else each for each in self._under_way.pop(op))

    def finish(self) -> None:
        assert not self._under_way, f"never taken: {[str(op) for op in self._under_way]}"
