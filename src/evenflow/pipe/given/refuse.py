"""What is refused: models that are wrapped, compiled or untrainable, arguments of the wrong kind."""

import difflib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError, PeerError
from evenflow.graph.deferred import changed_since
from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.graph.recipes import memory_of
from evenflow.runtime.ranks.world import World

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse_unfit(model: torch.nn.Module, *, loading: bool = False) -> None:
    """Raise `ConfigError`, naming the line to change, for a model that is not plain or cannot be trained.

    Parameters may be without memory where `loading` gives them numbers.
    """
    _refuse_no_module(model)
    for path, module in model.named_modules():
        _refuse_wrapped(f"the model's module {path}" if path else "the model", module)
    if getattr(model, "hf_device_map", None) is not None:
        raise ConfigError("the model was spread by device_map=; remove that argument of from_pretrained")
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise ConfigError(f"the parameter {name} is a DTensor; remove the line parallelize_module(…)")
        if parameter.is_meta and changed_since(parameter):
            raise ConfigError(
                f"the parameter {name} was changed after deferred_init(), while it has no numbers; do that "
                "inside"
            )
    if not loading:
        _refuse_numberless(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient: there is nothing to train")


def _imported(module: str, name: str) -> tuple[type, ...]:
    """A class of torch's, if it was imported; else nothing can be one, and importing it takes a second."""
    found = sys.modules.get(module)
    return () if found is None else (getattr(found, name),)


def _refuse_numberless(model: torch.nn.Module) -> None:
    names = [name for name, p in model.named_parameters() if p.is_meta and memory_of(p) is None]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConfigError(
            f"parameters without memory (device 'meta') that nothing says how to initialise: "
            f"{', '.join(names[:5])}{more}; build the model, and convert it (.to(...)), inside "
            "evenflow.deferred_init() and not under torch.device('meta'), or give load=, a folder that holds "
            "its weights"
        )


def _refuse_wrapped(what: str, module: torch.nn.Module) -> None:
    kind = type(module).__name__
    if kind in _WRAPPERS:
        raise ConfigError(
            f"{what} is wrapped: remove the line {kind}(…) and pass the bare module (model.module)"
        )
    if isinstance(module, _imported("torch.distributed.fsdp", "FSDPModule")):
        raise ConfigError(f"{what} was sharded: remove the line fully_shard(…) and pass the bare module")
    if kind == "OptimizedModule":
        raise ConfigError(f"{what} was compiled: remove the line torch.compile(…) and pass the bare module")


def _refuse_no_module(model: object) -> None:
    """Raise `ConfigError` for a model that is no module; several are one `ModuleDict`."""
    if isinstance(model, torch.nn.Module):
        return
    kind = type(model).__name__
    if isinstance(model, dict | list | tuple):
        raise ConfigError(
            f"the model is a {kind}; several models (a student and its teacher) are handed over as one: "
            'torch.nn.ModuleDict({"student": …, "teacher": …}), and the loss function calls model["student"]'
        )
    raise ConfigError(f"the model is a {kind}; it must be a torch.nn.Module")


def refuse_together(world: World, what: str, problem: str | None) -> None:
    """Raise `ConfigError` where there is a `problem`, and on the other ranks `PeerError`; collective."""
    told = world.gather(problem)
    if problem is not None:
        raise ConfigError(f"{what}: {problem}")
    for rank, theirs in enumerate(told):
        if theirs is not None:
            raise PeerError(f"rank {rank} refused what {what} was given: {theirs}")


def unknown_module(argument: str, name: str, names: Sequence[str]) -> ConfigError:
    """What is said of a name in `argument` that is none of the model's `names`: the nearest of these."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return ConfigError(
        f"{argument}= names {name!r}, which is no module of the model; nearest are "
        f"{', '.join(map(repr, near))}"
    )


def check_whole(**arguments: Any) -> None:  # whatever the caller was given
    """Raise `ConfigError` naming the first argument that is given and no whole number."""
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{name}={value!r} must be a whole number")


def check_callable(*, needed: bool = False, **arguments: Any) -> None:  # whatever the caller was given
    """Raise `ConfigError` naming the first argument that is given (or `needed`) and cannot be called."""
    for name, value in arguments.items():
        if (needed or value is not None) and not callable(value):
            raise ConfigError(f"{name}= must be a function, not a {type(value).__name__}")
