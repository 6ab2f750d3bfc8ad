"""The processes of a run and the few collective things that they do outside the pipeline's own transfers.

`SingleProcess` has no peers. `ProcessGroupWorld` is torch.distributed, one rank a process, on Gloo between
CPUs and NCCL between GPUs: all its ranks, or some of them (a pipeline's, say: see `mesh`). Everything here
happens in the same order on every rank.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from evenflow.errors import PeerError
from evenflow.runtime.notes.whereabouts import Whereabouts, awaited
from evenflow.runtime.ranks.roll_call import RollCall

_LOG = logging.getLogger(__name__)
BATCHES = "comparing batches with all ranks"


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

    `members`: what the ranks are called among all processes of the run. Where these are parted into worlds
    like this one, `parts` has the members of each. `ways`: the groups from one rank to another that have been
    made. `whereabouts`, which the worlds of one process share, learn of each wait, where somebody watches.
    """

    rank: int
    size: int
    members: tuple[int, ...]
    parts: Sequence[Sequence[int]]
    device = torch.device("cpu")  # carries what is sent
    roll_call: RollCall | None = None
    whereabouts: Whereabouts | None = None
    ways: dict[tuple[int, int], dist.ProcessGroup]
    group: dist.ProcessGroup | None = None  # None: the group of all ranks, where there are several

    @property
    def is_first(self) -> bool:
        """Whether this is the first of all processes of the run."""
        return self.members[self.rank] == 0

    @abstractmethod
    def beside(self) -> "World":
        """All processes, over a group of their own and the host, for what another thread does; collective."""

    @abstractmethod
    def share(self, thing: Any, source: int) -> Any:  # any picklable object
        """The source's object, on every rank."""

    @abstractmethod
    def gather(self, thing: Any) -> list[Any]:  # any picklable object
        """Every rank's object, in rank order, on every rank."""

    @abstractmethod
    def gather_numbers(self, numbers: list[int], *, doing: str = BATCHES) -> list[list[int]]:
        """Every rank's (equally many, 64-bit) whole numbers, in rank order, on every rank.

        `doing` says, where a rank is lost meanwhile, what this is for.
        """

    @abstractmethod
    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send a tensor to a rank that receives one of the same shape and type."""

    @abstractmethod
    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """A new tensor shaped as `like`, filled by `source`."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int) -> "Pending":
        """Fill `tensor` everywhere with the source's; what is returned must be waited for."""

    @abstractmethod
    def add_up(self, tensor: torch.Tensor, target: int | None = None) -> "Pending":
        """Fill `tensor` with the sum of all ranks', on the target alone where there is one; as `broadcast`.

        Where there is a target, what others are left with is of no use.
        """

    @abstractmethod
    def highest(self, tensor: torch.Tensor) -> "Pending":
        """Fill `tensor` with the highest numbers of all ranks'; as `broadcast`."""


class SingleProcess(World):
    """No peers: every question is answered by this process."""

    rank = 0
    size = 1
    members = (0,)
    parts = (members,)

    def beside(self) -> World:
        return self

    def share(self, thing: Any, source: int) -> Any:
        return thing

    def gather(self, thing: Any) -> list[Any]:
        return [thing]

    def gather_numbers(self, numbers: list[int], *, doing: str = BATCHES) -> list[list[int]]:
        return [numbers]

    def send(self, tensor: torch.Tensor, target: int) -> None:
        raise AssertionError("a single process sends nothing")

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        raise AssertionError("a single process receives nothing")

    def broadcast(self, tensor: torch.Tensor, source: int) -> "Pending":
        return Pending()

    def add_up(self, tensor: torch.Tensor, target: int | None = None) -> "Pending":
        return Pending()

    def highest(self, tensor: torch.Tensor) -> "Pending":
        return Pending()


class ProcessGroupWorld(World):
    """The ranks of torch.distributed's default group, which must exist; collective.

    `device` is this rank's own. Where Gloo joins GPUs, or two ranks share one, which NCCL cannot join, all
    goes through the host's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.members = tuple(range(self.size))
        self.parts = (self.members,)
        self.device = torch.device("cpu") if self._is_for_host(device) else device
        self.ways = {}

    def part(self, group: dist.ProcessGroup, parts: Sequence[Sequence[int]]) -> "ProcessGroupWorld":
        """The ranks of a group, of which this one is one, as a world of their own."""
        made = copy.copy(self)
        made.group, made.parts, made.roll_call, made.ways = group, parts, None, {}
        made.members = tuple(dist.get_process_group_ranks(group))
        made.rank, made.size = made.members.index(self.members[self.rank]), len(made.members)
        return made

    def beside(self) -> World:
        assert self.size == dist.get_world_size(), "torch lets all processes make a group together"
        made = self.part(dist.new_group(backend="gloo"), self.parts)
        made.device, made.whereabouts = torch.device("cpu"), None  # the main thread's are watched
        return made

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
        with self._reported(f"waiting for what {self._named(source)} shares"):
            dist.broadcast_object_list(box, self.members[source], group=self.group, device=self.device)
        return box[0]

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        with self._reported("gathering from all ranks"):
            dist.all_gather_object(things, thing, group=self.group)
        return things

    def gather_numbers(self, numbers: list[int], *, doing: str = BATCHES) -> list[list[int]]:
        if self.roll_call is not None and 0 < len(numbers) <= self.roll_call.most_numbers:
            with self._reported(doing):
                return self.roll_call.gather(numbers)
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        table = mine.new_empty(self.size, len(numbers))
        with self._reported(doing):
            if backend_of(self.device) == "gloo":
                # Each tells each at once. Gloo's all_gather goes around a ring: 14 ms in place of 5 for four
                # ranks on two hosts that are 2 ms apart (measured 2026-11-23).
                dist.all_to_all_single(table, mine.expand_as(table).contiguous(), group=self.group)
            else:
                dist.all_gather(list(table), mine, group=self.group)
        return [list(map(int, row)) for row in table.tolist()]

    def send(self, tensor: torch.Tensor, target: int) -> None:
        with self._reported(f"sending to {self._named(target)}", target):
            dist.send(tensor.to(self.device).contiguous(), self.members[target], group=self.group)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        into = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        with self._reported(f"receiving from {self._named(source)}", source):
            dist.recv(into, self.members[source], group=self.group)
        return into.to(like.device)

    def broadcast(self, tensor: torch.Tensor, source: int) -> "Pending":
        def begin(carried: torch.Tensor) -> "dist.Work | None":
            work: dist.Work | None = dist.broadcast(
                carried, self.members[source], group=self.group, async_op=True
            )
            return work

        return self._carried(tensor, begin, f"waiting for {self._named(source)}")

    def add_up(self, tensor: torch.Tensor, target: int | None = None) -> "Pending":
        def begin(carried: torch.Tensor) -> "dist.Work | None":
            work: dist.Work | None
            if target is None:
                work = dist.all_reduce(carried, group=self.group, async_op=True)
            else:
                work = dist.reduce(carried, self.members[target], group=self.group, async_op=True)
            return work

        return self._carried(tensor, begin, "adding up with other ranks")

    def highest(self, tensor: torch.Tensor) -> "Pending":
        def begin(carried: torch.Tensor) -> "dist.Work | None":
            work: dist.Work | None = dist.all_reduce(
                carried, dist.ReduceOp.MAX, group=self.group, async_op=True
            )
            return work

        return self._carried(tensor, begin, "comparing with other ranks")

    def _carried(
        self, tensor: torch.Tensor, begin: Callable[[torch.Tensor], "dist.Work | None"], doing: str
    ) -> "Pending":
        """Begin with the tensor itself where the ranks carry such; else bring a copy to the end."""
        with self._reported(doing):
            if tensor.device.type == self.device.type:
                return Pending(begin(tensor), partial(self._reported, doing))
            carried = tensor.to(self.device)
            work = begin(carried)
            if work is not None:
                work.wait()
        tensor.copy_(carried)
        return Pending()

    def _named(self, rank: int) -> str:
        return f"rank {self.members[rank]}"

    @contextmanager
    def _reported(self, doing: str, peer: int | None = None) -> Iterator[None]:
        """Note the wait, and turn torch.distributed's errors into one that says which rank was doing what.

        What all do together waits for all: from one to another it may go through a third.
        """
        with awaited(self.whereabouts, self.members if peer is None else (self.members[peer],), doing):
            try:
                yield
            except PeerError:
                raise
            except (RuntimeError, OSError) as error:
                mine = self.members[self.rank]
                raise PeerError(f"rank {mine} lost its peer while {doing}: {error}") from error


class Pending:
    """What ranks do together and have begun; who waits for its end does so as `reported` says."""

    def __init__(
        self,
        work: "dist.Work | None" = None,
        reported: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._work, self._reported = work, reported

    def wait(self) -> None:
        """Wait for its end: that tensors have their numbers."""
        if self._work is not None:
            with self._reported():
                self._work.wait()
