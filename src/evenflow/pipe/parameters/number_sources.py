"""Where a model's numbers come from: the files of a folder, or the recipes of `deferred_init`."""

from collections.abc import Iterator, Mapping

import torch

from evenflow.checkpoint.weights_in import Weights
from evenflow.errors import ConfigError
from evenflow.graph.recipes import Recipes


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
            _fill_buffers(model, self.weights)

    def fill(self, parameters: dict[str, torch.nn.Parameter], homes: Mapping[str, torch.device]) -> None:
        """Fill in the parameters that have a home here, in `parameters`; the others are left as they are."""
        if self.weights is not None:
            _fill_parameters(parameters, self.weights, homes=homes)
        parameters |= _materialise(parameters, self.recipes, homes)


def _fill_buffers(model: torch.nn.Module, weights: Weights) -> None:
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


def _fill_parameters(
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


def recipes_of(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    weights: Weights | None,
    *,
    seed: int,
) -> Recipes:
    """The recipes of the parameters that have no numbers yet; buffers without numbers get theirs at once.

    Every process fills in every buffer, on the CPU: masks and tables are computed from them everywhere.
    What a folder's `weights` hold needs no recipe.
    """
    places = [place for place in _empty_tensors(model) if weights is None or place[0] not in weights]
    wanted = {name: p for name, p in parameters.items() if weights is None or name not in weights}
    recipes = Recipes({**wanted, **{name: tensor for name, _, tensor in places}}, seed=seed)
    if recipes.unknown:
        folder = "" if weights is None else f"load={str(weights.folder)!r} does not hold them and "
        raise ConfigError(
            f"{len(recipes.unknown)} tensors of the model have no memory (device 'meta'), and "
            f"{folder}nothing "
            f"says what their numbers are: {', '.join(recipes.unknown)}; build the model inside "
            "evenflow.deferred_init()"
        )
    pair = recipes.overlapping()
    if pair is not None:
        raise ConfigError(
            f"{pair[0]} and {pair[1]} are different views of the same memory, which deferred_init() cannot "
            "keep; register one parameter and compute the other in forward"
        )
    made: dict[int, torch.Tensor] = {}  # one tensor in two places stays one
    for name, place, tensor in places:
        if id(tensor) not in made:
            made[id(tensor)] = recipes.materialise(name, torch.device("cpu"))
        place[name.rpartition(".")[2]] = made[id(tensor)]
    return recipes


def _materialise(
    parameters: Mapping[str, torch.nn.Parameter], recipes: Recipes, devices: Mapping[str, torch.device]
) -> dict[str, torch.nn.Parameter]:
    """Those of the named parameters that have no numbers yet, with them, each on its device; no others."""
    return {
        name: _filled(parameter, recipes.materialise(name, devices[name]))
        for name, parameter in parameters.items()
        if name in recipes and name in devices
    }


def _filled(empty: torch.nn.Parameter, numbers: torch.Tensor) -> torch.nn.Parameter:
    """The parameter with its numbers, and whatever the model's code wrote on the empty one."""
    parameter = torch.nn.Parameter(numbers, requires_grad=empty.requires_grad)
    vars(parameter).update(vars(empty))
    parameter._backward_hooks = empty._backward_hooks
    parameter._post_accumulate_grad_hooks = empty._post_accumulate_grad_hooks
    return parameter


def _empty_tensors(
    model: torch.nn.Module,
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], torch.Tensor]]:
    """Buffers and tensor attributes without memory: (name, the dictionary that holds it, tensor)."""
    for path, module in model.named_modules():
        for place in (module._buffers, vars(module)):
            for key, tensor in list(place.items()):
                if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                    continue
                if not isinstance(tensor, torch.nn.Parameter):  # hidden from the module: not ours to copy
                    yield f"{path}.{key}" if path else key, place, tensor
