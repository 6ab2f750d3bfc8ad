"""Weights in: which tensors of a folder a model needs, checked before anything runs, and read when asked for.

A process reads only what its stages own or use, so the check comes first and looks at headers alone.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from evenflow.checkpoint.files import TensorFiles, open_folder
from evenflow.checkpoint.huggingface import conversions, is_pretrained, not_forgiven
from evenflow.checkpoint.recipes import Recipe, same_names, shapes_made
from evenflow.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """One folder's part of a model. `places` maps a name of the folder's model to those that it fills."""

    files: TensorFiles
    recipes: tuple[tuple[Recipe, tuple[str, ...]], ...]  # each with the names that it makes
    places: Mapping[str, tuple[str, ...]]


class Weights:
    """A folder (or two: a base model's and an adapter's) that fits a model. Made by `find_weights`."""

    def __init__(self, folder: Path, sources: list[Source], tensors: Mapping[str, torch.Tensor]) -> None:
        self.folder = folder
        self._sources, self._tensors = sources, tensors

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of each of the wanted parameters and buffers that the files hold, on the CPU.

        A tied parameter comes once for each of its names in the files.
        """
        for source in self._sources:
            with source.files.reader() as reader:
                for recipe, makes in source.recipes:
                    if not any(place in wanted for name in makes for place in source.places.get(name, ())):
                        continue
                    dtype = self._tensors[_place(source.places, recipe, makes)].dtype
                    made = recipe.make(lambda key, dtype=dtype: reader.read(key, dtype))  # type: ignore[misc]
                    for name, tensor in made.items():
                        for place in source.places.get(name, ()):
                            if place in wanted:
                                yield place, tensor


def _place(places: Mapping[str, tuple[str, ...]], recipe: Recipe, makes: Collection[str]) -> str:
    """One tensor of the model that a recipe fills."""
    return next(place for name in (recipe.first, *makes) for place in places.get(name, ()))


def find_weights(model: torch.nn.Module, folder: Path, first_names: Mapping[str, str]) -> Weights:
    """Find a model's weights in a folder of safetensors files, reading headers alone.

    `first_names` maps every name of a parameter to the first one of the same tensor.

    Raises:
        ConfigError: The folder holds no safetensors; or it lacks keys of the model, holds others, or some
            of another shape, which are all listed.
    """
    tensors, places = _places(model, first_names)
    files = open_folder(folder)
    expected = {name: tensors[place] for name, (place,) in places.items()}
    recipes = conversions(model, files.shapes, expected) if is_pretrained(model) else same_names(files.shapes)
    made = {recipe.first: shapes_made(recipe, files.shapes) for recipe in recipes}
    found = {name: shape for shapes in made.values() for name, shape in shapes.items()}
    _check(model, folder, found, places, tensors)
    with_names = tuple((recipe, tuple(made[recipe.first])) for recipe in recipes)
    return Weights(folder, [Source(files, with_names, places)], tensors)


def _places(
    model: torch.nn.Module, first_names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
    """The model's distinct parameters and persistent buffers, and which of them each state name means."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first_of = {id(named[name]): first for name, first in first_names.items()}
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, tuple[str, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):  # what get_extra_state returns is no tensor
            place = first_of.setdefault(id(tensor), name)
            tensors.setdefault(place, tensor)
            places[name] = (place,)
    return tensors, places


def _check(
    model: torch.nn.Module,
    folder: Path,
    found: Mapping[str, torch.Size],
    places: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    filled = {place for name in found for place in places.get(name, ())}
    missing = {name for name, held in places.items() if filled.isdisjoint(held)}
    unexpected = set(found) - set(places)
    if is_pretrained(model):
        missing, unexpected = not_forgiven(model, missing, unexpected)
    misshapen = {
        f"{name} is {list(shape)} there and {list(tensors[place].shape)} here"
        for name, shape in found.items()
        for place in places.get(name, ())
        if tensors[place].shape != shape
    }
    faults = [
        f"{len(keys)} {what}: {_listed(keys)}"
        for what, keys in (
            ("missing from the folder", missing),
            ("unexpected in it", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if faults:
        raise ConfigError(
            f"load={str(folder)!r} does not fit the {type(model).__name__}; {'; '.join(faults)}. Load a folder of "
            "the same model, or fill the model yourself (from_pretrained, load_state_dict) and leave load= out"
        )


def _listed(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys))
