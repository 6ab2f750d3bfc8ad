"""What Python could have told a program besides its arguments, as values that can be compared.

A recording repeats what the program did; a number that came from an attribute, a closure or a global was
part of that and is not asked for again. So it belongs to the key: another number is another recording.
Compared are plain values, containers and objects by their contents, functions by what they are made of,
tensors by identity. Of objects that the loss function or a user's own module can reach, only those
attributes count whose names occur in its code: a trainer's step counter must not make every step another
program.
"""

import functools
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from evenflow.graph.python.reach import PLAIN, closure_of, codes_of, is_library

THE_LOSS_FUNCTION = "the loss function"  # where a snapshot says that a value was found
# What every module has; `training` aside, it is compared by other means or not at all.
MODULES_OWN = frozenset(vars(torch.nn.Module())) - {"training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEPTH = 10  # of objects in objects
_LARGEST_ARRAY = 2**20  # numbers that are compared; a larger array counts by identity

Snapshot = Mapping[str, Any]  # where a value was found -> a stand-in that can be compared


class Same:
    """Equal only to itself, and kept alive, so that its id is not used again."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def frozen(value: Any) -> Any:  # any value
    """A hashable stand-in, equal for values that a program could not tell apart.

    >>> frozen([1, {"a": 2.0}]) == frozen([1, {"a": 2.0}]), frozen([1]) == frozen([2])
    (True, False)
    """
    return Freezer().frozen(value)


def changed_names(before: Snapshot, after: Snapshot, *, tensors: bool = True) -> list[str]:
    """Where two snapshots differ; without `tensors` one tensor in the place of another is no difference."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if tensors:
        return changed
    return [name for name in changed if tensors_alike(before.get(name)) != tensors_alike(after.get(name))]


def tensors_alike(stand_in: Any) -> Any:
    """A stand-in in which all tensors are alike."""
    match stand_in:
        case Same(thing=torch.Tensor()):
            return torch.Tensor
        case tuple() | frozenset():
            return type(stand_in)(tensors_alike(each) for each in stand_in)
        case _:
            return stand_in


def seen_by_function(program: Callable[..., Any], model: torch.nn.Module, names: frozenset[str]) -> Snapshot:
    """What a loss function is made of: its code, closure, defaults and the globals that it names."""
    freezer = Freezer(names, {id(module) for module in model.modules()})
    found = freezer.parts(program, THE_LOSS_FUNCTION)
    return found | ({"os.environ": freezer.frozen(dict(os.environ))} if names & {"environ", "getenv"} else {})


def attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What a module carries besides its parameters: its own attributes, submodules, buffers and hooks."""
    own = vars(module)
    found = {key: value for key, value in own.items() if key not in MODULES_OWN}
    found |= {f"_modules.{key}": part for key, part in module._modules.items()}
    found |= {f"_buffers.{key}": part for key, part in module._buffers.items()}
    held = ((key, part) for key, part in module._parameters.items() if part is not None)
    found |= {f"{key}.requires_grad": part.requires_grad for key, part in held}
    for table in HOOKS:
        if own[table]:
            hooks = [hook for hook in own[table].values() if not getattr(hook, "evenflow", False)]
            found |= {table: tuple(map(Same, hooks))} if hooks else {}
    return found


def without_tensors(value: Any) -> Any:  # any value
    """A mapping without its tensors: where those come from and go to is seen, so keeping one is no state."""
    if type(value) is not dict:
        return value
    return {key: each for key, each in value.items() if not isinstance(each, torch.Tensor)}


class Freezer:
    """Makes stand-ins; each object once. `names`: the attributes of objects that count, all by default.

    Modules whose id is in `model` are compared elsewhere. Without `objects` those that are neither plain,
    containers nor generators count by identity.
    """

    def __init__(
        self,
        names: frozenset[str] | None = None,
        model: Iterable[int] = (),
        *,
        objects: bool = True,
    ) -> None:
        self.names, self.model = names, frozenset(model)
        self.objects = objects
        self.known: dict[int, tuple[Any, Any]] = {}  # stand-in and value, so that its id is not used again

    def frozen(self, value: Any, depth: int = _DEPTH) -> Any:  # any value
        kind = type(value)
        if kind in (int, str, bool, type(None), bytes):
            return kind, value
        if kind in (float, complex):
            return kind, repr(value)  # repr: nan equals itself, 0.0 is not -0.0
        if isinstance(value, (Same, *BY_IDENTITY)):
            return value if isinstance(value, Same) else Same(value)
        if id(value) not in self.known:
            if not depth:
                return Same(value)  # this time: it may stand elsewhere too, where its inside is in reach
            self.known[id(value)] = Same(value), value  # what it is while its own inside is looked at
            self.known[id(value)] = self.inside(value, depth - 1), value
        return self.known[id(value)][0]

    def inside(self, value: Any, depth: int) -> Any:  # noqa: PLR0911 (one for each kind of value)
        match value:
            case list() | tuple() | deque():
                return type(value), tuple(self.frozen(each, depth) for each in value)
            case set() | frozenset():
                return type(value), frozenset(self.frozen(each, depth) for each in value)
            case Mapping():
                pairs = ((self.frozen(k, depth), self.frozen(v, depth)) for k, v in value.items())
                return type(value), tuple(pairs)
            case np.ndarray():
                small = value.size <= _LARGEST_ARRAY and value.dtype != object
                return (value.dtype.str, value.shape, value.tobytes()) if small else Same(value)
            case random.Random():
                return Same(value), hash(value.getstate())
            case np.random.Generator():
                return Same(value), repr(value.bit_generator.state)
            case FunctionType() | MethodType() | functools.partial():
                if self.names is None:
                    return Same(value)
                return tuple(self.parts(value, "", depth).items())
            case type():
                return Same(value) if is_library(value) else (Same(value), *self.class_values(value).items())
            case ContextVar():
                return Same(value), self.frozen(value.get(None), depth)
            case ModuleType():
                return Same(value), self.named(value, vars(value), depth)
            case torch.nn.Module():
                return self.outer_module(value, depth)
            case _ if not self.objects:
                return Same(value)
            case _:
                own = dict(getattr(value, "__dict__", ()))
                slots = (n for kind in type(value).__mro__ for n in _slots(kind) if hasattr(value, n))
                own |= {name: getattr(value, name) for name in slots}
                kind = type(value)
                shared = () if self.names is None or is_library(kind) else self.class_values(kind).items()
                return Same(value), self.named(value, own, depth), *shared

    def named(self, value: Any, own: Mapping[str, Any], depth: int) -> Any:
        """The attributes that count; of a namespace only its data, for the rest does not change."""
        if isinstance(value, ModuleType):
            names = own.keys() & (self.names or ())
            own = {n: own[n] for n in names if isinstance(own[n], (*PLAIN, list, dict, set))}
        elif self.names is not None:
            own = {name: each for name, each in own.items() if name in self.names}
        return tuple((name, self.frozen(each, depth)) for name, each in own.items())

    def outer_module(self, module: torch.nn.Module, depth: int) -> Any:
        """A module: one of the model is looked at elsewhere, any other (a criterion) by its attributes."""
        if id(module) in self.model:
            return Same(module)
        pairs = ((path, attributes(inner)) for path, inner in module.named_modules())
        return Same(module), tuple(
            (path, key, self.frozen(value, depth)) for path, own in pairs for key, value in own.items()
        )

    def class_values(self, kind: type) -> dict[str, Any]:
        """Plain values, containers and properties that a user's class and its bases hold."""
        found: dict[str, Any] = {}
        for base in reversed(kind.__mro__):  # a class goes before its bases, which may have its name
            for key, value in vars(base).items() if not is_library(base) else ():
                where = f"{base.__qualname__}.{key}"
                if isinstance(value, property) and value.fget is not None:
                    found |= self.parts(value.fget, where)
                elif isinstance(value, (*PLAIN, list, dict, set, tuple)) and not key.startswith("__"):
                    found[where] = self.frozen(value)
        return found

    def parts(self, function: Callable[..., Any], where: str, depth: int = _DEPTH) -> dict[str, Any]:
        """What a function is made of, each part under its place."""
        match function:
            case FunctionType() if is_library(function):
                return {where: Same(function)}
            case FunctionType(__code__=code):
                found: dict[str, Any] = {where: code}
                for name, value in closure_of(function).items():
                    found[f"{where}: {name}"] = self.frozen(value, depth)
                for name in dict.fromkeys(name for inner in codes_of(code) for name in inner.co_names):
                    if name in function.__globals__:
                        found[f"{where}: global {name}"] = self.frozen(function.__globals__[name], depth)
                found[f"{where}: defaults"] = self.frozen(
                    [function.__defaults__, function.__kwdefaults__], depth
                )
                if hasattr(function, "__wrapped__"):
                    found |= self.parts(function.__wrapped__, f"{where}: wrapped", depth)
                return found
            case MethodType():
                return {
                    **self.parts(function.__func__, where, depth),
                    f"{where}: self": self.frozen(function.__self__, depth),
                }
            case functools.partial():
                arguments = self.frozen([function.args, function.keywords], depth)
                return {**self.parts(function.func, where, depth), f"{where}: arguments": arguments}
            case _:
                found = {where: self.frozen(function, depth)}
                call = vars(type(function)).get("__call__")
                return found | (
                    self.parts(call, f"{where}: call", depth) if isinstance(call, FunctionType) else {}
                )


# What is compared by identity: tensors have their own ways into a recording, the rest cannot change.
BY_IDENTITY = (torch.Tensor, torch.dtype, torch.device, torch.Generator, torch.Size, CodeType)


def _slots(kind: type) -> tuple[str, ...]:
    own = vars(kind).get("__slots__", ())
    return (own,) if isinstance(own, str) else tuple(own)
