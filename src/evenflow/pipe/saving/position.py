"""Where a run is in its data: which pass over a loader, and how many of its batches have been trained on.

A run that goes on passes the same batches by. A loader that has `state_dict` and `load_state_dict`
(torchdata's `StatefulDataLoader`, say) does that itself; of any other the batches are read and dropped, its
shuffling begun with the random numbers that began it before.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from evenflow.pipe.saving.random_state import random_state, random_state_of


@runtime_checkable
class Stateful(Protocol):
    """A loader that knows where it is."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there with the next pass."""
        ...


Begin = Callable[[Iterable[Any]], Iterator[Any]]


class Position:
    """Where the training is; every rank has one. `epoch` counts the passes that have ended.

    A pass that begins inside of another one (a validation, say) is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.epoch = 0
        self._num_batches = 0  # of this pass, given out
        self._began: Mapping[str, Any] | None = None  # the random state in which this pass began
        self._loader: Stateful | None = None  # that of this pass, or of the last one
        self._restored: Mapping[str, Any] | None = None
        self._is_open = False

    def counted(self, feed: Callable[[Begin], Iterator[Any]]) -> Iterator[Any]:
        """A pass over what is fed; `feed` is told how a loader begins, on the rank that reads it."""
        if self._is_open:
            yield from feed(iter)
            return
        restored, self._restored = self._restored, None
        self._num_batches, self._is_open = (0 if restored is None else restored["num_batches"]), True
        try:
            for batch in feed(partial(self._left, restored=restored)):
                self._num_batches += 1
                yield batch
            self.epoch, self._num_batches = self.epoch + 1, 0
        finally:
            self._is_open = False

    def _left(self, loader: Iterable[Any], *, restored: Mapping[str, Any] | None) -> Iterator[Any]:
        """What is left of a loader in the pass that begins: all, or what the run had not trained on."""
        self._loader = loader if isinstance(loader, Stateful) else None
        if self._loader is not None:
            if restored is not None and restored["loader"] is not None:
                self._loader.load_state_dict(restored["loader"])
            self._began = None
            return iter(loader)
        with random_state_of(None if restored is None else restored["began"], self._device):
            self._began = random_state(self._device)
            iterator = iter(loader)
            for _ in itertools.islice(iterator, 0 if restored is None else restored["num_batches"]):
                pass
        return iterator

    def state(self) -> dict[str, Any]:
        """Where it is, as plain values and tensors."""
        return {
            "epoch": self.epoch,
            "num_batches": self._num_batches,
            "began": self._began if self._num_batches else None,
            "loader": None if self._loader is None else self._loader.state_dict(),
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Let the next pass be what was left of the one in which `state` was asked."""
        self.epoch = state["epoch"]
        self._restored = state
