"""A pipeline's state as plain data, by the model's own names: taken from one cut, put into any other.

What a process gives is what it owns; the states of all processes, merged, are the whole run's. Optimizer
states go by the parameter's name, because stages are a matter of the cut.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evenflow.checkpoint.plain import merged
from evenflow.pipe.given.refuse import refuse_together
from evenflow.pipe.parameters.update import Updater
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.together import Together

__all__ = ["merged", "put_back", "state_of"]

# Of a group of parameters: what is not a number that a schedule may have changed.
_WHICH = ("params", "param_names")


def state_of(
    updater: Updater, tensors: Mapping[str, torch.Tensor], *, step: int, num_updates: int
) -> dict[str, Any]:
    """What this process tells of the run. `tensors`: its parameters and buffers."""
    masters = {} if updater.rules.masters is None else updater.rules.masters.by_name
    scale = updater.rules.loss_scale
    named = {id(parameter): name for name, parameter in [*updater.parameters, *masters.items()]}
    return {
        "step": step,
        "num_updates": num_updates,
        "model": {name: tensor.detach() for name, tensor in tensors.items()},
        "masters": {name: each.detach() for name, each in masters.items() if updater.answers(name, each)},
        "loss_scale": {} if scale is None else dataclasses.asdict(scale),
        "optimizer": {
            named[id(parameter)]: dict(state)
            for optimizer in updater.optimizers.values()
            for parameter, state in optimizer.state.items()
            if updater.answers(named[id(parameter)], parameter)
        },
        "settings": {
            named[id(parameter)]: {key: value for key, value in group.items() if key not in _WHICH}
            for optimizer in updater.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        },
        "optimizers": {type(each).__name__: {} for each in _members(updater)},
        "schedulers": {
            str(stage): scheduler.state_dict()
            for stage, scheduler in zip(updater.optimizers, updater.schedulers, strict=False)
        },
    }


def put_back(
    updater: Updater,
    world: World,
    buffers: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    optimizer: bool,
) -> None:
    """Give this process's parameters, buffers, optimizers and schedulers their part of a state.

    `world` are all processes.

    Raises:
        ConfigError: The state lacks a parameter of this process, has another shape, or is one of other
            optimizers; nothing was changed.
        PeerError: So it is on another rank.
    """
    problem = _problem(dict(updater.parameters), state["model"])
    refuse_together(world, "load", problem or (_other_optimizers(updater, state) if optimizer else None))
    try:
        _fill_tensors(updater, buffers, state, optimizer=optimizer)
        if optimizer:
            _fill_optimizers(updater, state)
    except Exception as error:  # noqa: BLE001 (a stranger may have written it; all hear of it)
        problem = f"this is no state: {type(error).__name__}: {error}"
    refuse_together(world, "load", problem)
    updater.spread()


def _fill_tensors(
    updater: Updater, buffers: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, optimizer: bool
) -> None:
    tensors, masters = state["model"], updater.rules.masters
    with torch.no_grad():
        for name, tensor in [*updater.parameters, *buffers.items()]:
            if name in tensors:
                tensor.copy_(tensors[name])
        for name, master in masters.by_name.items() if masters is not None else ():
            known = optimizer and name in state["masters"]
            master.copy_(state["masters"][name] if known else tensors[name])


def _fill_optimizers(updater: Updater, state: Mapping[str, Any]) -> None:
    masters = updater.rules.masters
    if updater.rules.loss_scale is not None and state["loss_scale"]:
        updater.rules.loss_scale.go_on(**state["loss_scale"])
    held = [*updater.parameters, *(masters.by_name.items() if masters is not None else ())]
    names = {id(parameter): name for name, parameter in held}
    for member in _members(updater):
        _fill(member, names, state["optimizer"], state["settings"])
    for stage, scheduler in zip(updater.optimizers, updater.schedulers, strict=False):
        found = _of_scheduler(scheduler, stage, state["schedulers"])
        if found is not None:
            scheduler.load_state_dict(found)


def _members(updater: Updater) -> list[torch.optim.Optimizer]:
    """The optimizers of this process, those of one stage one by one."""
    every = updater.optimizers.values()
    return [each for one in every for each in (one.members if isinstance(one, Together) else (one,))]


def _of_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler, stage: int, states: Mapping[str, Any]
) -> Any:  # a state, or None
    """A scheduler's state, of which lists that have a number for each group are made for the groups here.

    All have made the same steps, so that where the cut was another the state of any stage will do. None where
    there is none.
    """
    if not states:
        return None
    state = copy.deepcopy(states.get(str(stage), next(iter(states.values()))))
    _suit(state, scheduler.optimizer.param_groups)
    return state


def _suit(state: Any, groups: Sequence[Mapping[str, Any]]) -> None:  # a scheduler's state, or a part of it
    """Give it, and what is inside of it, the rates that these groups have."""
    for each in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        _suit(each, groups)
    if isinstance(state, dict) and "base_lrs" in state:
        state["base_lrs"] = [group.get("initial_lr", group["lr"]) for group in groups]
    if isinstance(state, dict) and "_last_lr" in state:
        state["_last_lr"] = [group["lr"] for group in groups]


def _other_optimizers(updater: Updater, state: Mapping[str, Any]) -> str | None:
    """Why the states of optimizers do not suit these, if they don't."""
    saved, remedy = state["optimizers"], "give the same, or load without: optimizer=False"
    for made in (type(each).__name__ for each in _members(updater)):
        if saved and made not in saved:
            return f"it has states of {' and '.join(sorted(saved))}, and optimizer= makes {made}; {remedy}"
    return None


def _problem(own: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> str | None:
    for name, parameter in own.items():
        if name not in tensors:
            return f"there is no parameter {name}; merge the states of all processes, of the same model"
        if tensors[name].shape != parameter.shape:
            return (
                f"the parameter {name} has shape {list(tensors[name].shape)}, and the model's "
                f"{list(parameter.shape)}"
            )
    return None


def _fill(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    states: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
) -> None:
    """Load what is known of an optimizer's parameters, in the numbering that it gives them."""
    packed = optimizer.state_dict()
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for group, described in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        held = [names[id(parameter)] for parameter in group["params"]]
        for name, at in zip(held, described["params"], strict=True):
            if name in states:
                state[at] = states[name]
        groups.append({**described, **(settings.get(held[0], {}) if held else {})})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, its in optimizer.state.items():  # torch gives them the parameter's type
        for key, value in states[names[id(parameter)]].items():
            if isinstance(value, torch.Tensor) and its[key].dtype != value.dtype:
                its[key] = value.to(its[key].device)
