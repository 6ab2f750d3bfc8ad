"""Where a process's random generators stand: torch's, Python's and NumPy's, which loaders draw from.

What a model draws does not depend on them (`runtime.program.rng`).
"""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """That of the host's generators and of a device's; plain values and tensors.

    >>> before = random_state(torch.device("cpu"))
    >>> drawn = random.random(), float(torch.rand(()))
    >>> set_random_state(before, torch.device("cpu"))
    >>> drawn == (random.random(), float(torch.rand(())))
    True
    """
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    return found


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on where `random_state` was asked."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in sys.modules and "numpy" in state:
        kind, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, keys.numpy().astype("uint32"), *rest))


@contextmanager
def random_state_of(state: Mapping[str, Any] | None, device: torch.device) -> Iterator[None]:
    """Inside, the generators go on from there; afterwards from where they were. None changes nothing."""
    if state is None:
        yield
        return
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
