"""Saver: copies what a pipeline has, and lets a thread of its own write that while the training goes on.

The copies are made between two steps, into memory that is kept for the next time; pages that are new to a
process cost it more than what is written to them. The thread has a group of processes of its own.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from evenflow.checkpoint.save import Content, write_checkpoint
from evenflow.graph.dtensors import local_part
from evenflow.runtime.whereabouts import awaited
from evenflow.runtime.world import World


@dataclass(slots=True)
class _Thread:
    world: World
    pool: ThreadPoolExecutor


class Saver:
    """Writes one checkpoint at a time. `world`: all processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._thread: _Thread | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._written: Future[None] | None = None

    def snapshot(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies, on the host, of what this process has of each; until the next snapshot.

        Waits for what is being written.
        """
        if self._written is not None:
            with self._waiting():
                self._written.exception()  # whoever waits for it is told
        copies, on_device = {}, False
        for key, tensor in tensors.items():
            part = local_part(tensor)
            kept = self._copies.get(key)
            if kept is None or kept.shape != part.shape or kept.dtype != part.dtype:
                kept = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            copies[key] = kept.copy_(part, non_blocking=True)
            on_device = on_device or part.is_cuda
        if on_device:
            torch.cuda.synchronize()
        self._copies = copies
        return copies

    def write(self, folder: Path, content: Content, after: Callable[[Path], None] | None = None) -> None:
        """Begin to write a folder; collective. `after` is called on the first rank when it is there."""
        if self._thread is None:
            self._thread = _Thread(self._world.beside(), ThreadPoolExecutor(1, "evenflow-save"))
        world = self._thread.world

        def run() -> None:
            write_checkpoint(folder, world, content)
            if after is not None and world.is_first:
                after(folder)

        self._written = self._thread.pool.submit(run)

    def wait(self) -> None:
        """Wait until what was begun is written; raises what `write_checkpoint` does, on all ranks."""
        written, self._written = self._written, None
        if written is not None:
            with self._waiting():
                written.result()

    def _waiting(self) -> AbstractContextManager[None]:
        world = self._world
        return awaited(world.whereabouts, world.members, "its part of a checkpoint to be written")
