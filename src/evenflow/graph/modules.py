"""What a module brings along and leaves behind: hooks, attributes that its forward changes."""

from typing import Any

import torch

from evenflow.graph.template import is_plain

ABSENT = object()  # stands for an attribute that was not there


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


def python_state(module: torch.nn.Module) -> dict[str, Any]:
    """A module's own attributes, and its buffers under `_buffers.NAME`."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") or key == "_buffers"}
    return own | {f"_buffers.{key}": value for key, value in own.pop("_buffers", {}).items()}


def changed_attributes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the attributes that differ between two states."""

    def same(old: Any, new: Any) -> bool:
        return old is new or (is_plain(old) and is_plain(new) and type(old) is type(new) and old == new)

    return [key for key in before | after if not same(before.get(key, ABSENT), after.get(key, ABSENT))]


def set_attribute(module: torch.nn.Module, key: str, value: Any) -> None:
    """Put an attribute back as it was before the run; buffers are put back by `buffers_copied`."""
    if key.startswith("_buffers."):
        if value is ABSENT:
            del module._buffers[key.removeprefix("_buffers.")]
    elif value is ABSENT:
        del vars(module)[key]
    else:
        vars(module)[key] = value
