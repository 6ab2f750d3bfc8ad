"""Clocks: when ops of a device begin and end. A mark is taken on the way, and read after the step.

A GPU works behind the host's back, so its marks are events in its stream: taking one waits for nobody.
"""

import time
from abc import ABC, abstractmethod
from typing import Any

import torch


class Clock(ABC):
    """Marks moments of a device's work, and tells later when they were, on the host's clock."""

    @abstractmethod
    def mark(self) -> Any:
        """This moment: when what the device was given so far is done."""

    @abstractmethod
    def has_passed(self, mark: Any) -> bool:
        """Whether a mark was reached; waits for nothing."""

    @abstractmethod
    def seconds(self, mark: Any) -> float:
        """When a mark was reached; waits for that."""


class HostClock(Clock):
    """The host does the work itself.

    >>> clock = HostClock()
    >>> clock.seconds(clock.mark()) <= clock.seconds(clock.mark())
    True
    """

    def mark(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        """See `Clock`."""
        return True

    def seconds(self, mark: float) -> float:
        """See `Clock`."""
        return mark


class CudaClock(Clock):
    """Events in a device's current stream, counted from one at the beginning.

    When that was reached is found when the first mark is read, by one more event that is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = self.mark()
        self._begun_seconds: float | None = None

    def mark(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        """See `Clock`."""
        return bool(mark.query())

    def seconds(self, mark: torch.cuda.Event) -> float:
        """See `Clock`."""
        if self._begun_seconds is None:
            since = self._since(self.mark())
            self._begun_seconds = time.perf_counter() - since
        return self._begun_seconds + self._since(mark)

    def _since(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        seconds: float = self._begun.elapsed_time(mark) * 1e-3
        return seconds


def clock_of(device: torch.device) -> Clock:
    """The clock of a device's work; to be made when a step begins."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
