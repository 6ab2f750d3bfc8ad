"""Which memory a piece of code makes, how much of it at once, and what of it is still there afterwards.

On CUDA the allocator tells the peak. On the CPU a dispatch mode sees every tensor that a kernel returns;
what a kernel takes for itself and gives back before it returns is not seen. (torch's profiler sees that too,
but writes lines of its own to the error stream, and takes seconds to start.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evenflow.graph.kernels.fakes import storage_of
from evenflow.graph.nouns.dtensors import local_part


class Memory:
    """A tensor's memory, without holding it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.num_bytes = storage.nbytes()
        self.number = storage_of(tensor)
        self._weak = StorageWeakRef(storage)

    @property
    def alive(self) -> bool:
        """Whether anybody holds it still."""
        return not self._weak.expired()


class Made(TorchDispatchMode):
    """Notes the memories that kernels make while it is on, and the most that were there at once.

    On the CPU it can `include` what was there before, for as long as it is there.

    >>> with Made(torch.device("cpu")) as made:
    ...     x = torch.ones(256) + 1  # two of 1 KiB, then one
    >>> made.peak_bytes, sum(memory.num_bytes for memory in made.alive())
    (2048, 1024)
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._device = device
        self._memories: dict[int, Memory] = {}  # by number; a number is used again once a memory is gone
        self._seen_bytes = 0
        self._noted_bytes = 0  # at least what is alive: what has gone is found out now and then
        self._before_bytes = 0

    def __enter__(self) -> "Made":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before_bytes = torch.cuda.memory_allocated(self._device)
        super().__enter__()  # type: ignore[no-untyped-call]  # as above
        return self

    @property
    def peak_bytes(self) -> int:
        """The most that was there at once of what was made."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._before_bytes)
        return self._seen_bytes

    def held_bytes(self) -> int:
        """What is there now of what was made and included, on the CPU."""
        return sum(memory.num_bytes for memory in self.alive())

    def include(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these tensors' memories too, which were there before."""
        for tensor in tensors:
            self._note(tensor)
        self._look()

    def alive(self) -> list[Memory]:
        """What was made and is still held."""
        self._memories = {number: memory for number, memory in self._memories.items() if memory.alive}
        return list(self._memories.values())

    def _note(self, given: torch.Tensor) -> None:
        tensor = local_part(given)
        number = storage_of(tensor)
        if number < 0:  # a sparse tensor, which has no one memory
            return
        if number not in self._memories or not self._memories[number].alive:
            self._memories[number] = Memory(tensor)
            self._noted_bytes += self._memories[number].num_bytes

    def _look(self) -> None:
        """See whether there is more than ever; looking at all costs time, so only where there may be."""
        if self._noted_bytes > self._seen_bytes:
            self._noted_bytes = sum(memory.num_bytes for memory in self.alive())
            self._seen_bytes = max(self._seen_bytes, self._noted_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = {storage_of(tensor) for tensor in given}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in there:
                self._note(tensor)
        self._look()
        return result
