"""What two ranks send each other to find out about the link between them.

Both call `exchange`, one as side 0 and one as side 1, in a process group of the two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from evenflow.cost.clock import timed

MAX_BYTES = 64 * 2**20
_SIZES = (1, 7, 1024, 2**20 + 1, MAX_BYTES)
_NUM_PINGS = 30
_NUM_TRANSFERS = 3


@dataclass(frozen=True, slots=True)
class Exchange:
    """A link that works. Side 0 to side 1 is there, the other way is back.

    - `together_bytes_per_second`: of one direction, while the other is as busy.
    - `overlap_share`: how much of the shorter of a transfer and a computation was hidden behind the other, 0
      to 1.
    """

    latency_seconds: float
    there_bytes_per_second: float
    back_bytes_per_second: float
    together_bytes_per_second: float
    overlap_share: float


class WrongDataError(Exception):
    """Other bytes arrived than were sent."""


def exchange(side: int, device: torch.device) -> Exchange:
    """Check and time the link to the other side; raises `WrongDataError` on the side that received it."""
    ends = _Ends(side, device)
    for size in _SIZES:
        for sender in (0, 1):
            ends.check(size, sender)
    latency_seconds = ends.ping()
    block = torch.zeros(MAX_BYTES, dtype=torch.uint8, device=device)
    there, back = ends.seconds(lambda: ends.carry(block, 0)), ends.seconds(lambda: ends.carry(block, 1))
    into = torch.empty_like(block)
    together = ends.seconds(lambda: ends.swap(block, into))
    compute = _Computation(device, seconds=there)
    alone = ends.seconds(compute.run)

    def both() -> None:
        works = ends.start(block, into, sender=0)
        compute.run()
        ends.finish(works)

    hidden = there + alone - ends.seconds(both)
    return Exchange(
        latency_seconds,
        MAX_BYTES / there,
        MAX_BYTES / back,
        MAX_BYTES / together,
        min(max(hidden / min(there, alone), 0.0), 1.0),
    )


class _Ends:
    def __init__(self, side: int, device: torch.device) -> None:
        self._side, self._peer, self._device = side, 1 - side, device
        self._byte = torch.zeros(1, dtype=torch.uint8, device=device)

    def check(self, size: int, sender: int) -> None:
        """Carry a pattern that no other transfer carries, and compare all of it."""
        pattern = _pattern(size, salt=sender, device=self._device)
        if self._side == sender:
            dist.send(pattern, self._peer)
            return
        arrived = torch.empty_like(pattern)
        dist.recv(arrived, self._peer)
        if num_wrong := int((arrived != pattern).sum()):
            raise WrongDataError(f"of {size} bytes {num_wrong} arrived changed")

    def ping(self) -> float:
        """Seconds of one byte's way, by the median of there and back."""
        times = []
        for _ in range(_NUM_PINGS):
            start = time.perf_counter()
            for sender in (0, 1):
                self.carry(self._byte, sender)
            self.settle()
            times.append(time.perf_counter() - start)
        return median(times) / 2

    def seconds(self, action: Callable[[], None]) -> float:
        """The median time of what both sides do, from when both are ready until both have done it."""
        times = []
        for _ in range(_NUM_TRANSFERS):
            dist.barrier()
            self.settle()
            start = time.perf_counter()
            action()
            self.settle()
            dist.barrier()
            self.settle()
            times.append(time.perf_counter() - start)
        return median(times)

    def carry(self, block: torch.Tensor, sender: int) -> None:
        """Send from one side to the other."""
        if self._side == sender:
            dist.send(block, self._peer)
        else:
            dist.recv(block, self._peer)

    def start(self, block: torch.Tensor, into: torch.Tensor, sender: int) -> list[dist.Work]:
        """Begin to send from one side to the other."""
        act, tensor = (dist.isend, block) if self._side == sender else (dist.irecv, into)
        return dist.batch_isend_irecv([dist.P2POp(act, tensor, self._peer)])

    def swap(self, block: torch.Tensor, into: torch.Tensor) -> None:
        """Send both ways at once."""
        ops = [dist.P2POp(dist.isend, block, self._peer), dist.P2POp(dist.irecv, into, self._peer)]
        self.finish(dist.batch_isend_irecv(ops))

    def finish(self, works: list[dist.Work]) -> None:
        """Wait for transfers."""
        for work in works:
            work.wait()

    def settle(self) -> None:
        """Wait until the device has done all that it was told."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Computation:
    """Products of matrices that take about as long as asked for."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        size = 4096 if device.type == "cuda" else 256
        self._matrix = torch.ones(size, size, device=device)
        self._times = 1
        self.run()
        self._times = max(1, round(seconds / timed(self.run, device)[0]))

    def run(self) -> None:
        for _ in range(self._times):
            torch.mm(self._matrix, self._matrix)


def _pattern(size: int, *, salt: int, device: torch.device) -> torch.Tensor:
    """Bytes that repeat after 251 places, a prime: a block that is lost, doubled or displaced shows."""
    period = ((torch.arange(251, device=device) + salt * 101 + size) % 251).to(torch.uint8)
    return period.repeat(size // 251 + 1)[:size]
