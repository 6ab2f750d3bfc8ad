"""ProcessGroupLink: parcels over torch.distributed, Gloo between CPUs and NCCL between GPUs.

Matching is by order alone: both ends walk the same proven program, so no tags are needed. How the tensors of
a parcel lie in memory is told once per kind of parcel, in a header before the first; after that a parcel is
its tensors and nothing else, and receives can be posted ahead. On Gloo they are, a few at a time. On NCCL a
receive occupies its device until it is served, and whatever brings the device to rest, such as freeing memory
or loading a kernel, waits for it: so each keeps its place, for which the program has been proven on one
serial queue a rank.

Gloo carries no tensors of GPUs: these go through the host's memory.

Groups of transfers run on Gloo, where a send waits for nobody. On NCCL they are refused: a group call needs
the size of everything in it, and those of gradients are learnt from headers, which would have to travel in
the group themselves. (`lower` writes no groups.)
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from evenflow.errors import PeerError, ScheduleError
from evenflow.ir.op import Recv, Send
from evenflow.ir.placement import Placement
from evenflow.runtime.links.layout import Layout, empty, pack, unpack
from evenflow.runtime.links.link import Link, Manifest, Parcel
from evenflow.runtime.links.ways import Way
from evenflow.runtime.ranks.world import backend_of

# On Gloo: receives under way beyond the place that the program has reached, and parcels that may be leaving
# while it goes on. A send waits for the oldest of them, as it may: the program also lives on a link on which
# every send waits for its receive.
RECEIVES_AHEAD = 4
SENDS_AHEAD = 1
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
_MAX_DIMS = 12


@dataclass(slots=True)
class _Leaving:
    """A parcel on its way; Gloo tells that it has left only to who waits for it."""

    works: list[dist.Work]
    blocks: list[torch.Tensor]

    @property
    def has_left(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass(slots=True)
class _Arriving:
    layouts: tuple[Layout | None, ...]
    blocks: list[torch.Tensor | None]
    works: list[dist.Work]


class ProcessGroupLink(Link):
    """One rank's end. `placement` says which rank holds a stage, `members` what it is in torch.distributed.

    `carrier` is the device whose tensors travel, by default the rank's own. `ways` are the groups for
    transfers from one rank to another; all others use the group of all ranks.
    """

    def __init__(
        self,
        device: torch.device,
        placement: Placement,
        carrier: torch.device | None = None,
        ways: Mapping[Way, dist.ProcessGroup] | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        ranks = range(placement.num_ranks) if members is None else members
        self._rank_of = tuple(ranks[rank] for rank in placement.rank_of)
        self._rank = dist.get_rank()
        self._device, self._ways = device, ways or {}
        self._carrier = carrier or device
        self._on_gloo = backend_of(self._carrier) == "gloo"
        self._ahead = RECEIVES_AHEAD if self._on_gloo else 0
        self.receives_ahead, self.sends_ahead = self._ahead, SENDS_AHEAD
        # NCCL's stream would wait, and compute too.
        self._most_leaving = SENDS_AHEAD if self._on_gloo else math.inf
        self._known: dict[
            tuple[Any, ...], tuple[Layout | None, ...]
        ] = {}  # parcel key -> how its tensors lie
        self._expected: deque[tuple[Recv, Manifest]] = deque()  # receives not yet under way, in program order
        self._arriving: dict[Recv, _Arriving] = {}
        self._reached = 0  # receives under way beyond the program's place
        self._leaving: deque[_Leaving] = deque()

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        self._expected = deque(receives)
        self._arriving.clear()
        self._reached = 0
        if self._expected:
            first = self._expected[0][0]
            try:
                self._look_ahead()
            except RuntimeError as error:
                raise self._lost(first, error) from error

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        self._send(op, parcel, manifest)
        try:
            while self._leaving and (len(self._leaving) > self._most_leaving or self._leaving[0].has_left):
                self._leaving.popleft().wait()
        except RuntimeError as error:
            raise self._lost(op, error) from error

    def _send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        try:
            layouts, leaving = self._layouts(manifest), _Leaving([], [])
            if layouts is None:
                layouts = tuple(None if tensor is None else Layout.of(tensor) for tensor in parcel)
                self._known[manifest.key] = layouts
                self._leave(_encode(layouts, self._carrier), op, leaving)
            for tensor, layout in zip(parcel, layouts, strict=True):
                if layout is None:
                    assert tensor is None, f"{op}: a gradient exists that did not in the first microbatch"
                    continue
                block = empty(layout, self._carrier).zero_() if tensor is None else pack(tensor, layout)
                self._leave(block.to(self._carrier), op, leaving)
            self._leaving.append(leaving)
        except RuntimeError as error:
            raise self._lost(op, error) from error

    def post(self, op: Recv) -> None:
        try:
            if op in self._arriving:
                self._reached -= 1
            else:
                expected, manifest = self._expected.popleft()
                assert expected == op, f"{op} where the program has {expected}"
                self._begin(op, manifest)
            self._look_ahead()
        except RuntimeError as error:
            raise self._lost(op, error) from error

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        if not self._on_gloo:
            group = ", ".join(map(str, (*(op for op, _, _ in sends), *receives)))
            raise ScheduleError(
                f"rank {self._rank}: the group {group} cannot run on {backend_of(self._carrier)}, where all "
                "sizes must be known beforehand; write the transfers one after the other, as `lower` does"
            )
        for op, parcel, manifest in sends:
            self._send(op, parcel, manifest)
        for recv in receives:
            self.post(recv)

    def take(self, op: Recv) -> Parcel:
        arriving = self._arriving.pop(op)
        try:
            for work in arriving.works:
                work.wait()
        except RuntimeError as error:
            raise self._lost(op, error) from error
        pairs = zip(arriving.blocks, arriving.layouts, strict=True)
        return tuple(
            None if block is None or layout is None else unpack(block.to(self._device), layout)
            for block, layout in pairs
        )

    def finish(self) -> None:
        assert not self._arriving, "a receive was never taken"
        assert not self._expected, "a receive was never posted"
        try:
            while self._leaving:
                self._leaving.popleft().wait()
        except RuntimeError as error:
            raise PeerError(
                f"rank {self._rank}: a peer was lost before it took all that was sent to it: {error}"
            ) from error

    def _layouts(self, manifest: Manifest) -> tuple[Layout | None, ...] | None:
        return self._known.get(manifest.key) if manifest.values else ()

    def _leave(self, block: torch.Tensor, op: Send, leaving: _Leaving) -> None:
        work = dist.isend(block, self._peer(op), group=self._way(op))
        assert work is not None, "this rank is part of the group"
        leaving.works.append(work)
        leaving.blocks.append(block)

    def _look_ahead(self) -> None:
        """Begin receives before their place, as long as what they will look like is known."""
        while (
            self._expected and self._reached < self._ahead and self._layouts(self._expected[0][1]) is not None
        ):
            op, manifest = self._expected.popleft()
            self._begin(op, manifest)
            self._reached += 1

    def _begin(self, op: Recv, manifest: Manifest) -> None:
        layouts, source, way = self._layouts(manifest), self._peer(op), self._way(op)
        if layouts is None:
            header = torch.empty(
                len(manifest.values) * (2 + 2 * _MAX_DIMS), dtype=torch.int64, device=self._carrier
            )
            dist.recv(header, source, group=way)
            layouts = self._known[manifest.key] = _decode(header)
        blocks = [None if layout is None else empty(layout, self._carrier) for layout in layouts]
        works = [dist.irecv(block, source, group=way) for block in blocks if block is not None]
        assert all(work is not None for work in works), "this rank is part of the group"
        self._arriving[op] = _Arriving(layouts, blocks, [work for work in works if work is not None])

    def _peer(self, op: Send | Recv) -> int:
        return self._rank_of[op.target if isinstance(op, Send) else op.source]

    def _way(self, op: Send | Recv) -> dist.ProcessGroup | None:
        return self._ways.get((self._rank_of[op.source], self._rank_of[op.target]))

    def _lost(self, op: Send | Recv, error: RuntimeError) -> PeerError:
        if isinstance(error, PeerError):
            return error
        return PeerError(
            f"rank {self._rank} lost rank {self._peer(op)} in {op} (microbatch {op.microbatch}): {error}"
        )


def _encode(layouts: Sequence[Layout | None], device: torch.device) -> torch.Tensor:
    """Layouts as whole numbers, equally many for each: type (-1: no tensor), dims, shape, strides."""
    rows = []
    for layout in layouts:
        row = [-1] * (2 + 2 * _MAX_DIMS)
        if layout is not None:
            dims = len(layout.shape)
            row[:2] = [_DTYPES.index(layout.dtype), dims]
            row[2 : 2 + dims] = layout.shape
            row[2 + _MAX_DIMS : 2 + _MAX_DIMS + dims] = layout.stride
        rows += row
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _decode(header: torch.Tensor) -> tuple[Layout | None, ...]:
    layouts: list[Layout | None] = []
    for row in header.view(-1, 2 + 2 * _MAX_DIMS).tolist():
        kind, dims = row[:2]
        shape, stride = row[2 : 2 + dims], row[2 + _MAX_DIMS : 2 + _MAX_DIMS + dims]
        layouts.append(None if kind < 0 else Layout(tuple(shape), tuple(stride), _DTYPES[kind]))
    return tuple(layouts)
