"""The processes of a run and the few collective things that they do outside the pipeline's own transfers.

`SingleProcess` holds every stage itself. `ProcessGroupWorld` is torch.distributed, one rank a process, on
Gloo between CPUs and NCCL between GPUs. Everything here happens in the same order on every rank.
"""

import logging
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from evenflow.errors import PeerError
from evenflow.runtime.roll_call import RollCall

_LOG = logging.getLogger(__name__)


def backend_of(device: torch.device) -> str:
    """What carries such a device's tensors in the group of all ranks: "gloo" or "nccl"."""
    return str(_backend(device).name())


def timeout_seconds(device: torch.device) -> float:
    """How long such devices' ranks wait for each other: as whoever made the group of all ranks has said."""
    waits: timedelta = _backend(device).options._timeout  # noqa: SLF001 (torch has no public way to ask)
    return waits.total_seconds()


def _has(device: torch.device) -> bool:
    """Whether the group of all ranks carries such a device's tensors."""
    try:
        return bool(backend_of(device))
    except RuntimeError:
        return False


def _backend(device: torch.device) -> Any:  # torch types none
    group = dist.group.WORLD
    assert group is not None, "there are several processes"
    return group._get_backend(device)  # noqa: SLF001 (as above)


class World(ABC):
    """Who is there. `rank` and `size` count processes; with a `roll_call` they gather numbers sooner.

    `ways`: the groups from one rank to another that have been made.
    """

    rank: int
    size: int
    device = torch.device("cpu")  # carries what is sent
    roll_call: RollCall | None = None
    ways: dict[tuple[int, int], dist.ProcessGroup]

    @abstractmethod
    def share(self, thing: Any, source: int) -> Any:  # any picklable object
        """The source's object, on every rank."""

    @abstractmethod
    def gather(self, thing: Any) -> list[Any]:  # any picklable object
        """Every rank's object, in rank order, on every rank."""

    @abstractmethod
    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's (equally many, 64-bit) whole numbers, in rank order, on every rank."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send a tensor to a rank that receives one of the same shape and type."""

    @abstractmethod
    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """A new tensor shaped as `like`, filled by `source`."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int) -> "dist.Work | None":
        """Fill `tensor` everywhere with the source's; what is returned, if anything, must be waited for."""


class SingleProcess(World):
    """No peers: every question is answered by this process."""

    rank = 0
    size = 1

    def share(self, thing: Any, source: int) -> Any:
        return thing

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        return [numbers]

    def send(self, tensor: torch.Tensor, target: int) -> None:
        raise AssertionError("a single process sends nothing")

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        raise AssertionError("a single process receives nothing")

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        return None


class ProcessGroupWorld(World):
    """The ranks of torch.distributed's default group, which must exist; collective.

    `device` is this rank's own. Where Gloo joins GPUs, or two ranks share one, which NCCL cannot join, all
    goes through the host's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu") if self._is_for_host(device) else device
        self.ways = {}

    def _is_for_host(self, device: torch.device) -> bool:
        if device.type == "cpu" or backend_of(device) == "gloo":
            return True
        if not _has(torch.device("cpu")):  # NCCL alone: it will say so itself
            return False
        gpus = self.gather(str(torch.cuda.get_device_properties(device).uuid))
        if len(set(gpus)) == len(gpus):
            return False
        if self.rank == 0:
            _LOG.warning("processes share a GPU, which NCCL cannot join: tensors go over Gloo")
        return True

    def share(self, thing: Any, source: int) -> Any:
        box = [thing]
        with reported(self.rank, f"waiting for what rank {source} shares"):
            dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        with reported(self.rank, "gathering from all ranks"):
            dist.all_gather_object(things, thing)
        return things

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        if self.roll_call is not None and 0 < len(numbers) <= self.roll_call.most_numbers:
            with reported(self.rank, "comparing batches with all ranks"):
                return self.roll_call.gather(numbers)
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        table = mine.new_empty(self.size, len(numbers))
        with reported(self.rank, "comparing batches with all ranks"):
            if backend_of(self.device) == "gloo":
                # Each tells each at once. Gloo's all_gather goes around a ring: 14 ms in place of 5 for four
                # ranks on two hosts that are 2 ms apart (measured 2026-11-23).
                dist.all_to_all_single(table, mine.expand_as(table).contiguous())
            else:
                dist.all_gather(list(table), mine)
        return [list(map(int, row)) for row in table.tolist()]

    def send(self, tensor: torch.Tensor, target: int) -> None:
        with reported(self.rank, f"sending to rank {target}"):
            dist.send(tensor.to(self.device).contiguous(), target)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        into = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        with reported(self.rank, f"receiving from rank {source}"):
            dist.recv(into, source)
        return into.to(like.device)

    def broadcast(self, tensor: torch.Tensor, source: int) -> "dist.Work | None":
        with reported(self.rank, f"waiting for rank {source}"):
            if tensor.device.type == self.device.type:
                work: dist.Work | None = dist.broadcast(tensor, source, async_op=True)
                return work
            carried = tensor.to(self.device)
            dist.broadcast(carried, source)
        tensor.copy_(carried)
        return None


class reported:  # noqa: N801 (a context manager, used like a function)
    """Turn torch.distributed's errors into one that says which rank was doing what."""

    def __init__(self, rank: int, doing: str) -> None:
        self.rank, self.doing = rank, doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError | OSError) and not isinstance(error, PeerError):
            raise PeerError(f"rank {self.rank} lost its peer while {self.doing}: {error}") from error
