"""A pipeline's state as plain data, by the model's own names: taken from one cut, put into any other.

What a process gives is what it owns; the states of all processes, merged, are the whole run's. Optimizer
states go by the parameter's name, because stages are a matter of the cut.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.graph.dtensors import is_dtensor
from evenflow.pipe.refuse import refuse_together
from evenflow.pipe.update import Updater
from evenflow.runtime.together import Together
from evenflow.runtime.world import World

# Of a group of parameters: what is not a number that a schedule may have changed.
_WHICH = ("params", "param_names")


def state_of(
    updater: Updater, tensors: Mapping[str, torch.Tensor], *, step: int, num_updates: int
) -> dict[str, Any]:
    """What this process knows of the run. `tensors`: its parameters and buffers."""
    _refuse_parted(updater, "state_dict()")
    masters = {} if updater.rules.masters is None else updater.rules.masters.by_name
    scale = updater.rules.loss_scale
    named = {id(parameter): name for name, parameter in [*updater.parameters, *masters.items()]}
    return {
        "step": step,
        "num_updates": num_updates,
        "model": {name: tensor.detach() for name, tensor in tensors.items()},
        "masters": {name: master.detach() for name, master in masters.items()},
        "loss_scale": {} if scale is None else dataclasses.asdict(scale),
        "optimizer": {
            named[id(parameter)]: dict(state)
            for optimizer in updater.optimizers.values()
            for parameter, state in optimizer.state.items()
        },
        "groups": [
            (
                [named[id(parameter)] for parameter in group["params"]],
                {key: value for key, value in group.items() if key not in _WHICH},
            )
            for optimizer in updater.optimizers.values()
            for group in optimizer.param_groups
        ],
        "schedulers": {
            stage: scheduler.state_dict()
            for stage, scheduler in zip(updater.optimizers, updater.schedulers, strict=False)
        },
    }


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of a run's processes as one.

    >>> parts = [{"step": 2, "model": {"a": 1}, "groups": []}, {"step": 2, "model": {"b": 2}, "groups": [3]}]
    >>> merged(parts)
    {'step': 2, 'model': {'a': 1, 'b': 2}, 'groups': [3]}
    """
    whole = dict(states[0])
    for state in states[1:]:
        for key, value in state.items():
            if isinstance(value, Mapping):
                whole[key] = {**whole[key], **value}
            elif isinstance(value, list):
                whole[key] = [*whole[key], *value]
    return whole


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
        ConfigError: The state lacks a parameter of this process, or has another shape; nothing was changed.
        PeerError: So it is on another rank.
    """
    own, masters = dict(updater.parameters), updater.rules.masters
    _refuse_parted(updater, "load_state_dict()")
    tensors = state["model"]
    refuse_together(world, "load_state_dict()", _problem(own, tensors))
    with torch.no_grad():
        for name, tensor in [*own.items(), *buffers.items()]:
            if name in tensors:
                tensor.copy_(tensors[name])
        for name, master in masters.by_name.items() if masters is not None else ():
            known = optimizer and name in state["masters"]
            master.copy_(state["masters"][name] if known else tensors[name])
    if optimizer:
        if updater.rules.loss_scale is not None and state["loss_scale"]:
            updater.rules.loss_scale.go_on(**state["loss_scale"])
        held = [*own.items(), *(masters.by_name.items() if masters is not None else ())]
        names = {id(parameter): name for name, parameter in held}
        settings = {name: settings for named, settings in state["groups"] for name in named}
        for one in updater.optimizers.values():
            for member in one.members if isinstance(one, Together) else (one,):
                _fill(member, names, state["optimizer"], settings)
        saved = state["schedulers"]
        for stage, scheduler in zip(updater.optimizers, updater.schedulers, strict=False):
            if saved:  # all have made the same steps: where the cut was another, any of them will do
                scheduler.load_state_dict(saved.get(stage, next(iter(saved.values()))))
    updater.spread()


def _refuse_parted(updater: Updater, what: str) -> None:
    for name, parameter in updater.parameters:
        if is_dtensor(parameter):
            raise ConfigError(
                f"{what} has whole tensors, and of {name} each rank has a part (tensor ranks, or "
                'shard="fsdp"): use save() and export()'
            )


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
                state[at] = copy.deepcopy(states[name])  # torch would go on in some of the same tensors
        groups.append({**described, **(settings.get(held[0], {}) if held else {})})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
