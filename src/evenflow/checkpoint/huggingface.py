"""Hugging Face's models: their file names differ from their parameter names, and transformers converts them.

Everything here asks transformers; it is imported only where a model is already one of its own.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from evenflow.checkpoint.recipes import Read, Recipe
from evenflow.errors import ConfigError


def is_pretrained(model: torch.nn.Module) -> bool:
    """Whether a model is one of transformers' own."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def conversions(model: Any, shapes: Mapping[str, torch.Size], expected: Mapping[str, Any]) -> list[Recipe]:
    """How transformers makes a model's tensors of the keys of a file.

    `expected` has the keys of the model's own `state_dict`, each with something that is not None. The same
    steps, in the same order, as transformers.core_model_loading.convert_and_load_state_dict_in_model takes to
    fill a whole model.
    """
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    mappings: dict[str, Any] = {}  # transformers' classes are not typed
    taken: dict[str, list[tuple[str, str]]] = {}  # name -> (file key, the pattern that it matched)
    for key in sorted(shapes, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:  # it already has the model's name
            name, pattern = loading.rename_source_key(key, [], [], prefix, expected)
        mappings.setdefault(
            name, loading.WeightRenaming(key, name) if pattern is None else by_pattern[pattern]
        )
        taken.setdefault(name, []).append((key, key if pattern is None else pattern))
    # As from_pretrained leaves it: what was converted on the way in is converted back on the way out.
    model._weight_conversions = [each for each in transforms if each.was_used()]  # noqa: SLF001
    return [
        Recipe(
            tuple(key for key, _ in taken[name]), name, partial(_convert, model, name, mapping, taken[name])
        )
        for name, mapping in mappings.items()
    ]


def _convert(
    model: Any, name: str, mapping: Any, taken: list[tuple[str, str]], read: Read
) -> dict[str, torch.Tensor]:
    own = copy.deepcopy(mapping)  # it keeps what it is given
    for key, pattern in taken:
        own.add_tensor(name, key, pattern, partial(read, key))
    try:
        made = own.convert(name, model=model, config=model.config)
    except Exception as error:
        keys = ", ".join(key for key, _ in taken)
        raise ConfigError(
            f"load=: transformers cannot make {name} of {keys}: {type(error).__name__}: {error}"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def not_forgiven(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Those of the missing and of the unexpected keys that the model's class does not allow for."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(info)  # noqa: SLF001 (the rules stand nowhere else)
    return info.missing_keys, info.unexpected_keys


def stored_name(model: Any, names: Sequence[str]) -> str | None:
    """Under which of a parameter's `names` transformers stores it: the one that others are tied to."""
    kept = [name for name in names if name not in (model._keys_to_ignore_on_save or ())]  # noqa: SLF001 (as above)
    return next((name for name in kept if name not in model.all_tied_weights_keys), kept[0] if kept else None)


def converted_back(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers stores them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def save_configs(model: Any, folder: Path) -> None:
    """Write the configurations of a model and of its generation, as its `save_pretrained` does."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
