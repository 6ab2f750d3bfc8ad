"""What Python could have told a program besides its arguments, as values that can be compared.

A recording repeats what the program did; a number that came from an attribute, a closure or a global was
part of that and is not asked for again. So it belongs to the key: another number is another recording.
Compared are plain values, and plain containers by their contents; anything else by identity. What cannot be
seen from here (the inside of other objects, helpers of helpers) is not compared.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEPTH = 3  # of containers in containers


class Same:
    """Equal only to itself, and kept alive, so that its id is not used again."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def frozen(value: Any, depth: int = _DEPTH) -> Any:  # any value
    """A hashable stand-in, equal for values that a program could not tell apart.

    >>> frozen([1, {"a": 2.0}]) == frozen([1, {"a": 2.0}]), frozen([1]) == frozen([2])
    (True, False)
    """
    if isinstance(value, PLAIN):
        return type(value), repr(value)  # repr: nan equals itself, 0.0 is not -0.0
    if depth and type(value) in (list, tuple, deque):
        return type(value), tuple(frozen(each, depth - 1) for each in value)
    if depth and type(value) in (set, frozenset):
        return type(value), frozenset(frozen(each, depth - 1) for each in value)
    if depth and isinstance(value, dict):
        return type(value), tuple((frozen(k, depth - 1), frozen(v, depth - 1)) for k, v in value.items())
    return Same(value)


def around_function(function: Callable[..., Any]) -> Any:
    """What a function is made of: its code, closure, defaults and the global values that it names."""
    match function:
        case FunctionType():
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            named = (function.__globals__.get(name) for name in function.__code__.co_names)
            values = [each for each in named if isinstance(each, (*PLAIN, list, tuple, dict, set, deque))]
            defaults = (function.__defaults__, function.__kwdefaults__)
            return function.__code__, frozen(cells), frozen(values), frozen(list(defaults))
        case MethodType():
            return around_function(function.__func__), _inside(function.__self__)
        case functools.partial():
            inner = (frozen(list(function.args)), frozen(function.keywords))
            return around_function(function.func), *inner
        case _:
            return _inside(function)


def _inside(thing: Any) -> Any:  # any object
    attributes = {} if isinstance(thing, torch.nn.Module) else getattr(thing, "__dict__", {})
    return Same(thing), frozen(dict(attributes))


def around_modules(modules: Iterable[torch.nn.Module]) -> Any:
    """What modules that were taken apart are made of: attributes, submodules, buffers."""
    return tuple((Same(module), _attributes(vars(module))) for module in modules)


def _attributes(own: Mapping[str, Any]) -> Any:
    public = tuple((key, frozen(value)) for key, value in own.items() if not key.startswith("_"))
    parts = (own.get("_modules", {}), own.get("_buffers", {}))
    return public, tuple((key, Same(part)) for group in parts for key, part in group.items())
