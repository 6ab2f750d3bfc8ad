"""Methods of a pipeline that may keep one rank busy for long while others wait: a watchdog is told."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from evenflow.pipe.parts import Parts
from evenflow.runtime.whereabouts import patiently

P = ParamSpec("P")
T = TypeVar("T")


class _HasParts(Protocol):
    _parts: Parts


H = TypeVar("H", bound=_HasParts)


def patient(
    doing: str,
) -> Callable[[Callable[Concatenate[H, P], T]], Callable[Concatenate[H, P], T]]:
    """Let a method have its time, under these words, which follow on the rank."""

    def wrapped(method: Callable[Concatenate[H, P], T]) -> Callable[Concatenate[H, P], T]:
        @functools.wraps(method)
        def called(self: H, /, *args: P.args, **options: P.kwargs) -> T:
            with patiently(self._parts.mesh.world.whereabouts, doing):
                return method(self, *args, **options)

        return called

    return wrapped
