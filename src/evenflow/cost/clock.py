"""Timing what a device does: the clock is read when it has done all that it was told."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(act: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """The seconds that something takes until the device has done it, and what it returned.

    >>> seconds, made = timed(lambda: torch.ones(2), torch.device("cpu"))
    >>> seconds > 0, made
    (True, tensor([1., 1.]))
    """
    start = _now(device)
    result = act()
    return _now(device) - start, result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
