"""Saver: copies what a pipeline has, and lets a thread of its own write that while the training goes on.

The copies are made between two steps, into memory that is kept for the next time; pages that are new to a
process cost it more than what is written to them. The thread has a group of processes of its own.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from evenflow.checkpoint.save import Content, write_checkpoint
from evenflow.graph.nouns.dtensors import local_part
from evenflow.runtime.notes.whereabouts import awaited
from evenflow.runtime.ranks.world import World

_LOG = logging.getLogger(__name__)


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

        What was begun before must have been waited for.
        """
        assert self._written is None, "its copies would change while they are written"
        copies, devices = {}, set()
        for key, tensor in tensors.items():
            part = local_part(tensor)
            kept = self._copies.get(key)
            if kept is None or kept.shape != part.shape or kept.dtype != part.dtype:
                kept = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            copies[key] = kept.copy_(part, non_blocking=True)
            if part.is_cuda:
                devices.add(part.device)
        for device in devices:
            torch.cuda.synchronize(device)
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
                try:
                    after(folder)
                except Exception as error:  # noqa: BLE001 (the checkpoint is written, and others know so)
                    _LOG.warning("%s is written, but not what follows: %s", folder, error)

        self._written = self._thread.pool.submit(run)

    def wait(self) -> None:
        """Wait until what was begun is written; raises what `write_checkpoint` does, on all ranks."""
        written, self._written, world = self._written, None, self._world
        if written is not None:
            with awaited(world.whereabouts, world.members, "its part of a checkpoint to be written"):
                written.result()

    def close(self) -> None:
        """Wait for what is being written, and let go of the thread and of the copies."""
        if self._thread is not None:
            self._thread.pool.shutdown()
            self._thread = None
        self._copies = {}
