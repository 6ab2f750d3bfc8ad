"""Recipes: how the tensors of a model come out of those of a file.

Mostly one file key is one tensor of the same name. Where a library stores its models otherwise (experts one
by one that the model holds stacked, say), a recipe takes several keys and makes one or several tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Read = Callable[[str], torch.Tensor]  # a file key -> its tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """Takes the tensors of `keys` and makes tensors under a model's names.

    `first` names one that it makes; all are read in that one's type. `make` returns tensors without memory,
    and so says what would be made, where `read` does.
    """

    keys: tuple[str, ...]
    first: str
    make: Callable[[Read], dict[str, torch.Tensor]]


def same_names(keys: Iterable[str]) -> list[Recipe]:
    """The recipes of a file whose keys are a model's `state_dict` names."""

    def recipe(key: str) -> Recipe:
        return Recipe((key,), key, lambda read: {key: read(key)})

    return [recipe(key) for key in keys]


def shapes_made(recipe: Recipe, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """What a recipe would make of tensors of these shapes; nothing is read."""
    made = recipe.make(lambda key: torch.empty(shapes[key], device="meta"))
    return {name: tensor.shape for name, tensor in made.items()}
