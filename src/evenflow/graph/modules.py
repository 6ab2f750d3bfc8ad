"""What a module brings along and leaves behind: hooks, attributes that its forward changes."""

import copy
from collections import deque
from typing import Any

import torch

from evenflow.graph.outside import frozen

_CONTAINERS = (list, dict, set, deque)


def reason_to_stay_whole(module: torch.nn.Module) -> str | None:
    """Why a module must not be taken apart, whatever it does; nothing for most."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(not getattr(hook, "evenflow", False) for table in hooks for hook in table.values()):
        return "it carries hooks"
    if type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, torch.nn.Sequential | torch.nn.ModuleList
    ):
        return "it is one of torch's own layers"
    return None


class Attribute:
    """An attribute as it was: the object, what it stood for, and the contents of a plain container."""

    def __init__(self, value: Any) -> None:
        self.value, self.frozen = value, frozen(_without_tensors(value))
        self.contents = copy.copy(value) if type(value) in _CONTAINERS else None

    def restored(self) -> Any:
        """The object with its contents as they were."""
        match self.value:
            case list() | deque() if self.contents is not None:
                self.value.clear()
                self.value.extend(self.contents)
            case dict() | set() if self.contents is not None:
                self.value.clear()
                self.value.update(self.contents)
        return self.value


def _without_tensors(value: Any) -> Any:
    """A mapping without its tensors: where those come from and go to is seen, so keeping one is no state."""
    if type(value) is not dict:
        return value
    return {key: each for key, each in value.items() if not isinstance(each, torch.Tensor)}


def python_state(module: torch.nn.Module) -> dict[str, Attribute]:
    """A module's own attributes, and its buffers under `_buffers.NAME`."""
    public = {key: Attribute(value) for key, value in vars(module).items() if not key.startswith("_")}
    return public | {f"_buffers.{key}": Attribute(buffer) for key, buffer in module._buffers.items()}


def changed_attributes(before: dict[str, Attribute], after: dict[str, Attribute]) -> list[str]:
    """Names of the attributes that differ between two states."""
    names = before | after
    return [n for n in names if n not in before or n not in after or before[n].frozen != after[n].frozen]


def touched_containers(before: dict[str, Attribute]) -> list[str]:
    """Names of containers whose contents are not those that they had."""

    def items(container: Any) -> list[int]:
        inside = (
            (each for pair in container.items() for each in pair) if type(container) is dict else container
        )
        return [id(each) for each in inside]

    full = {key: each for key, each in before.items() if each.contents is not None}
    return [key for key, each in full.items() if items(each.value) != items(each.contents)]


def set_attribute(module: torch.nn.Module, key: str, before: Attribute | None) -> None:
    """Put an attribute back as it was before the run; buffers are put back by `buffers_copied`."""
    if key.startswith("_buffers."):
        if before is None:
            del module._buffers[key.removeprefix("_buffers.")]
    elif before is None:
        del vars(module)[key]
    else:
        vars(module)[key] = before.restored()
