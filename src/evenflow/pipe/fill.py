"""Filling a model's parameters and buffers with the weights of a folder, where they belong."""

from collections.abc import Collection, Mapping

import torch

from evenflow.checkpoint.weights_in import Weights
from evenflow.errors import ConfigError
from evenflow.graph.fakes import FakeParameters


def fill_buffers(model: torch.nn.Module, weights: Weights) -> None:
    """Give the model the persistent buffers of the files; masks and tables are computed from them."""
    slots = [
        (f"{path}.{key}" if path else key, module, key)
        for path, module in model.named_modules()
        for key in module._buffers
    ]
    held = {name: (module, key) for name, module, key in slots}
    with torch.no_grad():
        for name, tensor in weights.read(held):
            module, key = held[name]
            buffer = module._buffers[key]
            assert buffer is not None, "it has a place in the files"
            if buffer.is_meta:
                module._buffers[key] = tensor
            else:
                buffer.copy_(tensor)
    without = sorted(name for name, buffer in model.named_buffers() if buffer.is_meta)
    if without:
        raise ConfigError(
            f"{len(without)} buffers have no memory (device 'meta'), and load="
            f"{str(weights.folder)!r} does not hold them: {', '.join(without)}; build the model with its "
            "buffers on the CPU"
        )


def fill_parameters(
    parameters: dict[str, torch.nn.Parameter],
    fakes: FakeParameters,
    weights: Weights,
    *,
    homes: Mapping[str, torch.device],
) -> None:
    """Fill the parameters that have a home here; one without memory is replaced by one that lies there.

    Raises `ConfigError` where the files hold different numbers for parameters that the model ties.
    """
    filled: set[str] = set()
    with torch.no_grad():
        for name, tensor in weights.read(homes):
            parameter = parameters[name]
            if name in filled:
                if not torch.equal(parameter.detach().cpu(), tensor):
                    raise ConfigError(
                        f"load={str(weights.folder)!r} holds different numbers for the names that the model "
                        f"ties to {name}; build it untied (tie_word_embeddings=False in its configuration)"
                    )
                continue
            filled.add(name)
            if parameter.is_meta:
                parameters[name] = _with_memory(parameter, homes[name])
            parameters[name].copy_(tensor)
    for module, key, fake in fakes.slots:
        name, held = fakes.names[id(fake)], module._parameters[key]
        if held is not None and held.is_meta and name in filled:
            module._parameters[key] = parameters[name]


def check_memory(
    parameters: Mapping[str, torch.nn.Parameter], kept: Collection[str], weights: Weights
) -> None:
    """Refuse parameters of this process that have no memory even now, an adapter's for example."""
    without = sorted(name for name in kept if parameters[name].is_meta)
    if without:
        raise ConfigError(
            f"{len(without)} parameters have no memory (device 'meta'), and load="
            f"{str(weights.folder)!r} does not hold them: {', '.join(without)}; build them on the CPU"
        )


def _with_memory(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    made = torch.nn.Parameter(
        torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
    )
    made.__dict__.update(parameter.__dict__)  # what libraries note on a parameter
    return made
