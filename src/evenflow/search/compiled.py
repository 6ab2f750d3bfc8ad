"""Compiled: numba's decorator with the type of the function that it decorates."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

# `_nrt=False` leaves out the counting of references, which would take three quarters of the time; no kernel
# here makes an array, so nothing needs it. The option is not documented.
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "_nrt": False}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` compiled by numba on its first call, and kept on disk for the next process.

    Numba looks at the changes of the decorated function's own file alone: after a change in a function that
    others call, delete `__pycache__`.

    Example:
        @compiled
        def double(number: int) -> int:
            return 2 * number
    """
    return cast("Callable[P, R]", numba.njit(**_OPTIONS)(function))


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` compiled into each of its callers.

    The kernels hand each other dozens of arrays, and passing them costs more than most functions do.
    """
    return cast("Callable[P, R]", numba.njit(**_OPTIONS, forceinline=True)(function))
