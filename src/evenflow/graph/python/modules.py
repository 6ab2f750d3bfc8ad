"""What a module brings along and leaves behind: hooks, attributes that its forward changes."""

import contextlib
import random
from collections import deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from evenflow.graph.python.outside import Freezer, Snapshot, attributes, without_tensors
from evenflow.graph.python.reach import is_library

_COLLECTING = "transformers.utils.output_capturing"
_DEPTH = 4  # of objects in objects
# Nothing of these is put back: they are looked into elsewhere, or cannot change.
_LEFT = (
    torch.Tensor,
    torch.nn.Module,
    FunctionType,
    MethodType,
    ModuleType,
    type,
    str,
    int,
    float,
    type(None),
)


def reason_to_stay_whole(module: torch.nn.Module) -> str | None:
    """Why a module must not be taken apart, whatever it does; nothing for most."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if not all(_only_watches(hook) for table in hooks for hook in table.values()):
        return "it carries hooks: put them on a module inside it, or do what they do in its forward"
    return None


def is_layer(module: torch.nn.Module) -> bool:
    """Whether a module is one of torch's own layers, which are not taken apart without need."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, torch.nn.Sequential | torch.nn.ModuleList
    )


def _only_watches(hook: Any) -> bool:
    """Whether a hook changes nothing: ours, and those by which transformers collects outputs of layers."""
    return getattr(hook, "evenflow", False) or getattr(hook, "__module__", "") == _COLLECTING


def python_state(module: torch.nn.Module) -> Snapshot:
    """A module's own attributes, and its buffers under `_buffers.NAME`, as they can be compared."""
    freezer = Freezer(objects=False)
    return {
        key: freezer.frozen(without_tensors(value))
        for key, value in attributes(module).items()
        if not key.startswith("_modules.")
    }


@contextlib.contextmanager
def python_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put back all that a run changes of the modules' Python state: attributes, hooks, what they hold."""
    kept = PythonState(model)
    try:
        yield
    finally:
        kept.restore()


class PythonState:
    """The contents of a model's attributes, and of the containers and objects in them, as they were."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: dict[int, Any] = {}  # holding a thing keeps its id from being used again
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.others: list[tuple[Any, Any]] = []
        self.states: list[tuple[Any, Any]] = []
        self.classes: list[tuple[type, dict[str, Any]]] = []
        for module in model.modules():
            self.keep_dict(vars(module))
            for value in list(vars(module).values()):
                self.keep(value, _DEPTH)
        for kind in {type(module) for module in model.modules() if not is_library(type(module))}:
            for base in kind.__mro__:
                if not is_library(base):
                    values = {key: value for key, value in vars(base).items() if not key.startswith("__")}
                    self.classes.append((base, values))

    def keep(self, value: Any, depth: int) -> None:
        if depth < 0 or id(value) in self.seen or isinstance(value, _LEFT):
            return
        self.seen[id(value)] = value
        match value:
            case dict():
                self.keep_dict(value)
                inner = list(value.values())
            case list() | deque() | set():
                self.others.append((value, list(value)))
                inner = list(value)
            case tuple():
                inner = list(value)
            case random.Random():
                self.states.append((value, value.getstate()))
                return
            case np.random.Generator():
                self.states.append((value, value.bit_generator.state))
                return
            case torch.Generator():
                self.states.append((value, value.get_state()))
                return
            case _ if isinstance(getattr(value, "__dict__", None), dict):
                self.keep_dict(vars(value))
                inner = list(vars(value).values())
            case _:
                return
        for each in inner:
            self.keep(each, depth - 1)

    def keep_dict(self, value: dict[Any, Any]) -> None:
        self.dicts.append((value, dict(value)))

    def restore(self) -> None:
        for now, before in self.dicts:
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                now.clear()
                now.update(before)
        for now, before in self.others:
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                now.clear()
                (now.update if isinstance(now, set) else now.extend)(before)
        for source, state in self.states:
            match source:
                case random.Random():
                    source.setstate(state)
                case torch.Generator():
                    source.set_state(state)
                case _:
                    source.bit_generator.state = state
        for kind, values in self.classes:
            for key, value in values.items():
                if vars(kind).get(key) is not value:
                    setattr(kind, key, value)
