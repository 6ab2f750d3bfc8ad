"""What a link between two processes of one host carries: one parcel to and fro, and a stream of them.

Shared memory, torch.distributed under our own link, and torch.distributed alone take turns; beside them what
this machine copies within one process. Of a stream as many parcels are under way as the link lets; over
torch.distributed alone, four.
Run: `python benchmarks/links.py`.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from quiet import Quiet

from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.launcher import launch
from evenflow.pipe.given.places import world_of
from evenflow.runtime.links.choose import link_for
from evenflow.runtime.links.link import Link, Manifest
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.ranks.world import World

SIZES = {"4 KiB": 2**12, "64 KiB": 2**16, "1 MiB": 2**20, "4 MiB": 2**22}
ROUNDS, TRIPS, STREAM = 7, 30, 60
UNDER_WAY = 4
_GIB = 2.0**30
_CPU = torch.device("cpu")

Timed = Callable[[], float]  # seconds of one parcel, one way


class OnLink:
    """Ranks 0 and 1 with a link between them, for parcels of one size."""

    def __init__(self, link: Link, rank: int, num_bytes: int) -> None:
        self.link, self.rank, self.other = link, rank, 1 - rank
        self.parcel = (torch.zeros(num_bytes // 4),)
        info = TensorInfo((num_bytes // 4,), (1,), torch.float32, False)
        self.manifests = {rank: Manifest((num_bytes, rank), (info,), _CPU) for rank in (0, 1)}
        self.payloads = {0: Payload.ACTIVATION, 1: Payload.GRADIENT}

    def _send(self, number: int) -> None:
        op = Send(self.rank, self.other, number, self.payloads[self.rank])
        self.link.send(op, self.parcel, self.manifests[self.rank])

    def _comes(self, number: int) -> Recv:
        return Recv(self.other, self.rank, number, self.payloads[self.other])

    def _start(self, number: int) -> None:
        self.link.start([(self._comes(each), self.manifests[self.other]) for each in range(number)])

    def _take(self, number: int) -> None:
        self.link.post(self._comes(number))
        self.link.take(self._comes(number))

    def there_and_back(self) -> float:
        """A parcel to and fro."""
        self._start(TRIPS)
        took = []
        turns = (self._send, self._take) if self.rank == 0 else (self._take, self._send)
        for number in range(TRIPS):
            start = time.perf_counter()
            for turn in turns:
                turn(number)
            took.append((time.perf_counter() - start) / 2)
        self.link.finish()
        return statistics.median(took)

    def stream(self) -> float:
        """Many parcels one way; the last is answered."""
        self._start(STREAM if self.rank else 1)
        start = time.perf_counter()
        if self.rank == 0:
            for number in range(STREAM):
                self._send(number)
            self._take(0)
        else:
            for number in range(STREAM):
                self._take(number)
            self._send(0)
        self.link.finish()
        return (time.perf_counter() - start) / STREAM


class OnTorch:
    """The same over torch.distributed alone."""

    def __init__(self, rank: int, num_bytes: int) -> None:
        self.rank = rank
        self.blocks = [torch.zeros(num_bytes // 4) for _ in range(UNDER_WAY)]

    def there_and_back(self) -> float:
        """A tensor to and fro."""
        took = []
        for _ in range(TRIPS):
            start = time.perf_counter()
            for turn in (dist.send, dist.recv) if self.rank == 0 else (dist.recv, dist.send):
                turn(self.blocks[0], 1 - self.rank)
            took.append((time.perf_counter() - start) / 2)
        return statistics.median(took)

    def stream(self) -> float:
        """Many tensors one way; the last is answered."""
        act = dist.isend if self.rank == 0 else dist.irecv
        works: list[dist.Work | None] = []
        start = time.perf_counter()
        for number in range(STREAM):
            if number >= UNDER_WAY:
                _wait(works[number - UNDER_WAY])
            works.append(act(self.blocks[number % UNDER_WAY], 1 - self.rank))
        for work in works[-UNDER_WAY:]:
            _wait(work)
        (dist.recv if self.rank == 0 else dist.send)(torch.zeros(1), 1 - self.rank)
        return (time.perf_counter() - start) / STREAM


def _wait(work: "dist.Work | None") -> None:
    assert work is not None, "this rank is part of the group"
    work.wait()


def on_rank() -> dict[str, dict[str, list[float]]]:
    """What each rank does: every kind in turn, several times."""
    world = world_of("cpu")
    quiet = Quiet(world)
    placement = Placement.linear(2)
    near, far = link_for(world, _CPU, placement), ProcessGroupLink(_CPU, placement)
    found: dict[str, dict[str, list[float]]] = {}
    for size, num_bytes in SIZES.items():
        ours, gloo = (OnLink(link, world.rank, num_bytes) for link in (near, far))
        alone = OnTorch(world.rank, num_bytes)
        kinds: Mapping[str, Timed] = {
            "shared memory, to and fro": ours.there_and_back,
            "process group, to and fro": gloo.there_and_back,
            "torch.distributed, to and fro": alone.there_and_back,
            "shared memory, stream": ours.stream,
            "process group, stream": gloo.stream,
            "torch.distributed, stream": alone.stream,
            "a copy in one process": partial(_copied, num_bytes),
        }
        for _ in range(ROUNDS):
            for kind, timed in kinds.items():
                together = _both(world, timed)
                took = quiet.measured(together, 1)
                found.setdefault(size, {}).setdefault(kind, []).extend(took)
    return found


def _both(world: World, timed: Timed) -> Timed:
    def together() -> float:
        world.gather_numbers([0])
        return timed()

    return together


def _copied(num_bytes: int) -> float:
    """Seconds of one copy between tensors that are in no cache but the last."""
    pairs = [(torch.zeros(num_bytes // 4), torch.zeros(num_bytes // 4)) for _ in range(UNDER_WAY)]
    for into, source in pairs:
        into.copy_(source)
    start = time.perf_counter()
    for number in range(STREAM):
        into, source = pairs[number % UNDER_WAY]
        into.copy_(source)
    return (time.perf_counter() - start) / STREAM


def main() -> None:
    torch.set_num_threads(1)
    found = launch(on_rank, nproc=2)[0]
    print("| parcel | | one way, us (range) | GiB/s | of a copy |")
    print("| --- | --- | --- | --- | --- |")
    for size, kinds in found.items():
        copied = statistics.median(kinds["a copy in one process"])
        for kind, took in kinds.items():
            seconds = statistics.median(took)
            micros, least, most = (f"{each * 1e6:,.0f}" for each in (seconds, min(took), max(took)))
            print(
                f"| {size} | {kind} | {micros} ({least} to {most}) "
                f"| {SIZES[size] / seconds / _GIB:.1f} | {copied / seconds:.0%} |"
            )


if __name__ == "__main__":
    main()
