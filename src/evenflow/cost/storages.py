"""Which memory a piece of code makes, how much of it at once, and what of it is still there afterwards.

On CUDA the allocator tells the peak. On the CPU a dispatch mode sees every tensor that a kernel returns;
what a kernel takes for itself and gives back before it returns is not seen. (torch's profiler sees that too,
but writes lines of its own to the error stream, and takes seconds to start.)
"""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from evenflow.graph.fakes import storage_of


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

    def alive(self) -> list[Memory]:
        """What was made and is still held."""
        self._memories = {number: memory for number, memory in self._memories.items() if memory.alive}
        return list(self._memories.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        there = {storage_of(tensor) for tensor in given}
        for tensor in pytree.tree_leaves(result):
            number = storage_of(tensor) if isinstance(tensor, torch.Tensor) else -1
            if number < 0 or number in there:  # (below 0: a sparse tensor, which has no one memory)
                continue
            if number not in self._memories or not self._memories[number].alive:
                self._memories[number] = Memory(tensor)
        self._seen_bytes = max(self._seen_bytes, sum(memory.num_bytes for memory in self.alive()))
        return result
