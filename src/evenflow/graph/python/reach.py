"""What code can reach: the functions of a program, those that they call, and all names in them.

An object's attribute can matter to a program only if its name stands somewhere in code that gets at it. What
attributes hold is followed in the same way: a property of an object's class counts if its name is used.
"""

import contextlib
import dis
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Libraries whose functions and classes do not change under us, so that their code is not followed.
_LIBRARIES = frozenset(
    {"torch", "numpy", "transformers", "timm", "diffusers", "peft", "builtins", "functools"}
)
# Methods that are called without their names.
_UNNAMED = frozenset({"__call__", "__getattr__", "__getattribute__", "__getitem__", "__iter__", "__len__"})
_MOST = 10_000  # things that are followed
_MOST_INSIDE = 100  # of a container


def is_library(thing: Any) -> bool:  # a class or a function
    """Whether a class or function comes with a library, whose code does not change under us."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _LIBRARIES


class Reach:
    """All that a loss function and a model's own modules, without libraries' code, can get at."""

    def __init__(self, program: Callable[..., Any], model: torch.nn.Module) -> None:
        self.codes: list[CodeType] = []
        self.names: set[str] = set()
        self._seen: dict[int, Any] = {}  # holding a thing keeps its id from being used again
        self._held: dict[int, Any] = {}  # objects of which only what has a name is followed
        kinds = {type(module) for module in model.modules()}
        self._follow([program, *(kind for kind in kinds if not is_library(kind))])
        self._follow([module.forward for module in model.modules() if "forward" in vars(module)])
        self._held |= {id(m): m for m in model.modules() if not is_library(type(m))}
        num_before = -1
        while num_before != len(self.names) + len(self._held):  # a name may lead to others
            num_before = len(self.names) + len(self._held)
            for thing in list(self._held.values()):
                self._follow_named(thing)

    def catches_errors(self) -> bool:
        """Whether any of the code catches errors."""
        return any("suppress" in code.co_names or _has_except(code) for code in self.codes)

    def _follow(self, things: Iterable[Any]) -> None:
        waiting = list(things)
        while waiting:
            thing = waiting.pop()
            if id(thing) in self._seen or isinstance(thing, (*PLAIN, torch.Tensor)) or self._full:
                continue
            self._seen[id(thing)] = thing
            match thing:
                case FunctionType():
                    if is_library(thing):
                        continue
                    codes = list(codes_of(thing.__code__))
                    self.codes += codes
                    self.names.update(name for code in codes for name in _words(code))
                    used = (name for code in codes for name in code.co_names)
                    waiting += closure_of(thing).values()
                    waiting += [thing.__globals__[name] for name in used if name in thing.__globals__]
                    waiting += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
                    waiting += [thing.__wrapped__] if hasattr(thing, "__wrapped__") else []
                case MethodType():
                    waiting += [thing.__func__, thing.__self__]
                case functools.partial():
                    waiting += [thing.func, *thing.args, *thing.keywords.values()]
                case list() | tuple() | set() | frozenset() | deque():
                    waiting += _some(thing)
                case dict():
                    waiting += _some(thing.values())
                case property():
                    waiting += [thing.fget]
                case type() if not is_library(thing):
                    own = (kind for kind in thing.__mro__ if not is_library(kind))
                    waiting += [value for kind in own for value in vars(kind).values()]
                case type() | ModuleType() | torch.nn.Module():
                    pass
                case _:
                    waiting += [type(thing)]
                    self._held[id(thing)] = thing

    @property
    def _full(self) -> bool:
        return len(self._seen) + len(self._held) > _MOST

    def _follow_named(self, thing: Any) -> None:
        """Follow those attributes of an object, and of its class, whose names are used somewhere."""
        own = getattr(thing, "__dict__", None)
        for name, value in list(own.items()) if isinstance(own, dict) else ():
            if name in self.names:
                self._hold(value)
        members = (item for k in type(thing).__mro__ if not is_library(k) for item in vars(k).items())
        self._follow(
            member
            for name, member in members
            if (name in self.names or name in _UNNAMED) and isinstance(member, FunctionType | property)
        )

    def _hold(self, value: Any) -> None:
        match value:
            case FunctionType() | MethodType() | functools.partial():
                self._follow([value])
            case _ if isinstance(value, (*PLAIN, torch.Tensor, torch.nn.Module, type, ModuleType)):
                pass
            case _ if id(value) not in self._held and not self._full:
                self._held[id(value)] = value
                inside = value.values() if isinstance(value, dict) else value
                if isinstance(value, dict | list | tuple | set | frozenset | deque):
                    for each in _some(inside):
                        self._hold(each)


def _some(things: Iterable[Any]) -> list[Any]:
    """The first things in a container, and of the rest one of each class."""
    listed = list(things)
    rest = {type(thing): thing for thing in reversed(listed[_MOST_INSIDE:])}
    return [*listed[:_MOST_INSIDE], *rest.values()]


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def closure_of(function: FunctionType) -> dict[str, Any]:
    """What the closure's cells hold, by name."""
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            found[name] = cell.cell_contents
    return found


def _words(code: CodeType) -> Iterable[str]:
    """Names that code uses; a string may be the name that `getattr` is given."""
    return (*code.co_names, *(each for each in code.co_consts if isinstance(each, str) and len(each) < 50))


@functools.lru_cache(maxsize=2**12)
def _has_except(code: CodeType) -> bool:
    """Whether code has an `except` clause: one that compares the error, or one that drops it unseen."""
    steps = [step.opname for step in dis.get_instructions(code)]
    dropped = ("PUSH_EXC_INFO", "POP_TOP") in itertools.pairwise(steps)
    return dropped or any(step.startswith("CHECK_E") for step in steps)
