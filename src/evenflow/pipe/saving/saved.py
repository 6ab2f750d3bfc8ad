"""What a pipeline gives to a checkpoint, and takes of one: the state of `state`, by the model's names.

A process reads what it holds and nothing else; of tensors that it has a part of, that part.
"""

from collections.abc import Mapping
from typing import Any

import torch

from evenflow.checkpoint.load import Checkpoint
from evenflow.checkpoint.plain import decode, keys_in
from evenflow.checkpoint.table import DTYPES
from evenflow.errors import ConfigError
from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.pipe.step.parts import Parts

_BY_NAME = ("model", "masters", "optimizer", "settings")


def layout_of(parts: Parts) -> str:
    """In words how a run is cut."""
    mesh, placement = parts.mesh, parts.programs.placement
    ranks = f"{mesh.pipeline.size} x {mesh.data.size} x {mesh.tensor.size} processes (pp x dp x tp)"
    return f"{placement.num_stages} stages on {placement.num_ranks} ranks, {ranks}"


def read_state(checkpoint: Checkpoint, parts: Parts, *, optimizer: bool) -> dict[str, Any]:
    """The state of which a checkpoint tells, as far as this process holds it; reads tensors.

    Raises `ConfigError` for what is damaged or no state.
    """
    updater, buffers = parts.updater, dict(parts.model.named_buffers())
    own: dict[str, torch.Tensor] = dict(updater.parameters)
    masters = {} if updater.rules.masters is None else updater.rules.masters.by_name
    wanted = {
        "model": {*own, *buffers},
        "masters": set(masters) if optimizer else set(),
        "optimizer": {name for name in own if updater.data.updates(name)} if optimizer else set(),
        "settings": set(own) if optimizer else set(),
    }
    rank = str(parts.mesh.world.rank)
    document = dict(checkpoint.document)
    for section in (*_BY_NAME, "processes"):
        if not isinstance(document.get(section), dict):
            raise ConfigError(f"{checkpoint.folder}: its state has no {section}")
    for section in _BY_NAME:
        document[section] = {n: each for n, each in document[section].items() if n in wanted[section]}
    document["processes"] = {r: each for r, each in document["processes"].items() if r in ("0", rank)}
    into: dict[str, torch.Tensor] = {}
    for section in ("model", "masters", "optimizer"):
        for name, each in document[section].items():
            for key in keys_in(each):
                into[key] = _empty(checkpoint, key, own.get(name))
    for key in keys_in(document) - set(into):
        into[key] = _empty(checkpoint, key, None)
    checkpoint.read(into)
    state = decode(document, into.__getitem__)
    assert isinstance(state, dict), "a document is one"
    return state


def _empty(checkpoint: Checkpoint, key: str, like: torch.Tensor | None) -> torch.Tensor:
    """A tensor to read into: parted as the parameter is of which it tells, or whole and on the host."""
    saved = checkpoint.table[key]
    dtype = DTYPES[saved.dtype]
    if like is not None and is_dtensor(like) and saved.shape == tuple(like.shape):
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(saved.shape, dtype=dtype)


def check_state(state: Mapping[str, Any], folder: object) -> None:
    """Refuse a state that lacks what every state has, or has it of another kind."""
    kinds = {
        "step": int,
        "num_updates": int,
        "seed": int,
        "loss_scale": dict,
        "optimizers": dict,
        "schedulers": dict,
    }
    for key, kind in kinds.items():
        if type(state.get(key)) is not kind:
            raise ConfigError(f"{folder}: its state has no {key}")
