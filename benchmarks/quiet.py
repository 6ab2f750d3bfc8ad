"""Whether the machine is quiet: a reference that takes longer while others use the machine.

Shared machines are slow in spells, of seconds to minutes. What is measured in one says nothing about the
program, so benchmarks run a reference between what they measure and leave out what lies beside a slow one.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from evenflow.runtime.ranks.world import World

T = TypeVar("T")

_SLOW = 1.3  # times the fastest reference, of all ranks at once
_VERY_SLOW = 1.4  # of one rank, whose neighbours do other things meanwhile
_MOST_TRIES = 4
_PACES = 25


class Quiet:
    """A transformer's layer, forward and backward, and a pass over memory: about 20 ms."""

    def __init__(self, world: World) -> None:
        self._world = world
        with torch.random.fork_rng():
            self._layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
            self._rows = torch.randn(2, 128, 256)
        self._memory = torch.zeros(2**22)
        self._best = float("inf")
        self._best_alone = float("inf")
        for _ in range(10):
            self.is_quiet()

    def is_quiet(self) -> bool:
        """Whether all ranks at once are about as fast as they ever were; collective."""
        took = self._together()
        self._best = min(self._best, took)
        return took < _SLOW * self._best

    def pace(self) -> float:
        """The median of some references of all ranks at once; collective."""
        return statistics.median(self._together() for _ in range(_PACES))

    def _together(self) -> float:
        self._world.gather_numbers([0])
        return float(max(row[0] for row in self._world.gather_numbers([int(self._seconds() * 1e6)])))

    def measured(self, seconds: Callable[[], float], number: int) -> list[float]:
        """So many measurements with quiet before and after; fewer if it takes four times as many tries.

        If it was never quiet, so many of any kind.
        """
        found: list[float] = []
        was_quiet = self.is_quiet()
        for _ in range(_MOST_TRIES * number):
            took = seconds()
            is_quiet = self.is_quiet()
            if was_quiet and is_quiet:
                found.append(took)
            if len(found) == number:
                break
            was_quiet = is_quiet
        if not found and self._world.rank == 0:
            print("  (never quiet)", flush=True)
        return found or [seconds() for _ in range(number)]

    def during(self, act: Callable[[Callable[[Any], None]], T]) -> T:
        """What `act` returns when it was quiet meanwhile, or the last of some tries; collective.

        `act` is given a function to call often.
        """
        for number in range(_MOST_TRIES):
            seen: list[float] = []
            result = act(partial(self._note, seen))
            self._best_alone = min(self._best_alone, *seen)
            slow = sum(each > _VERY_SLOW * self._best_alone for each in seen)
            was_slow = any(row[0] for row in self._world.gather_numbers([2 * slow > len(seen)]))
            if not was_slow or number == _MOST_TRIES - 1:
                return result
            if self._world.rank == 0:
                print(f"  (not quiet: {slow} of {len(seen)} references were slow; once more)", flush=True)
        raise AssertionError("the last try has returned")

    def _note(self, seen: list[float], _: Any) -> None:
        seen.append(self._seconds())

    def _seconds(self) -> float:
        start = time.perf_counter()
        self._layer(self._rows).sum().backward()
        self._memory.add_(1)
        return time.perf_counter() - start
