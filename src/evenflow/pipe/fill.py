"""Filling a model's parameters and buffers with the weights of a folder, where they belong."""

from collections.abc import Mapping

import torch

from evenflow.checkpoint.weights_in import Weights
from evenflow.errors import ConfigError
from evenflow.pipe.deferred import materialise, recipes_of


class Numbers:
    """Where a model's numbers come from: a folder's files, recipes, or the memory that they lie in already.

    Buffers get theirs at once. Raises `ConfigError` for what has no numbers and no source of any.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        first_names: Mapping[str, str],
        *,
        weights: Weights | None,
        seed: int,
    ) -> None:
        self.weights = weights
        self.recipes = recipes_of(model, parameters, self.weights, seed=seed)
        if self.weights is not None:
            fill_buffers(model, self.weights)

    def fill(self, parameters: dict[str, torch.nn.Parameter], homes: Mapping[str, torch.device]) -> None:
        """Fill in the parameters that have a home here, in `parameters`; the others are left as they are."""
        if self.weights is not None:
            fill_parameters(parameters, self.weights, homes=homes)
        parameters |= materialise(parameters, self.recipes, homes)


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


def fill_parameters(
    parameters: dict[str, torch.nn.Parameter],
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


def _with_memory(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    made = torch.nn.Parameter(
        torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
    )
    made.__dict__.update(parameter.__dict__)  # what libraries note on a parameter
    return made
