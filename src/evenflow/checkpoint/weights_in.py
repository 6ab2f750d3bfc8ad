"""Weights in: which tensors of a folder a model needs, checked before anything runs, and read when asked for.

A process reads only what its stages own or use, so the check comes first and looks at headers alone.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from evenflow.checkpoint import adapters, huggingface
from evenflow.checkpoint.files import Reader, TensorFiles, open_folder
from evenflow.checkpoint.quantised import refuse_quantised
from evenflow.checkpoint.recipes import Recipe, same_names, shapes_made
from evenflow.checkpoint.unfit import listed, misshapen
from evenflow.errors import ConfigError
from evenflow.foreign import shown


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
        made = ((source, name) for source in sources for _, makes in source.recipes for name in makes)
        self._names = {place for source, name in made for place in source.places.get(name, ())}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """In which types the files hold parameters and buffers, by name; only those that models train in."""
        return {
            place: source.files.dtypes[recipe.keys[0]]
            for source in self._sources
            for recipe, makes in source.recipes
            if recipe.keys[0] in source.files.dtypes
            for name in makes
            for place in source.places.get(name, ())
        }

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of each of the wanted parameters and buffers that the files hold, on the CPU.

        A tied parameter comes once for each of its names in the files.
        """
        for source in self._sources:
            with Reader(source.files) as reader:
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

    `first_names` maps every name of a parameter to the first one of the same tensor. For a model that
    `peft.get_peft_model` has wrapped the folder is the base model's, or an adapter's that names its base.

    Raises:
        ConfigError: The folder holds no safetensors; or it lacks keys of the model, holds others, or some
            of another shape, which are all listed; or its weights, or the model's, are quantised.
    """
    tensors, place_of = _tensors(model, first_names)
    if not adapters.is_adapted(model):
        adapters.refuse_injected(model)
        if adapters.is_adapter_folder(folder):
            raise ConfigError(
                f"load={str(folder)!r} holds an adapter, and the {type(model).__name__} has none: wrap it "
                "with peft.get_peft_model, or load the folder of a model"
            )
        own = {name: (place,) for name, place in place_of.items()}
        return Weights(folder, [_source(model, folder, own, tensors)], tensors)
    inner = adapters.base_model(model)
    places = _gathered((base, place_of[name]) for name, base in adapters.base_names(model, place_of).items())
    if not adapters.is_adapter_folder(folder):
        return Weights(folder, [_source(inner, folder, places, tensors)], tensors)
    base = _source(inner, adapters.base_folder(folder), places, tensors)
    saved = _gathered((key, place_of[name]) for name, key in adapters.saved_names(model, place_of).items())
    return Weights(folder, [base, _adapter_source(model, folder, saved, tensors)], tensors)


def _tensors(
    model: torch.nn.Module, first_names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The model's distinct parameters and persistent buffers by name, and which each state name means."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first_of = {id(named[name]): first for name, first in first_names.items()}
    tensors: dict[str, torch.Tensor] = {}
    place_of: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):  # what get_extra_state returns is no tensor
            place_of[name] = first_of.setdefault(id(tensor), name)
            tensors.setdefault(place_of[name], tensor)
    return tensors, place_of


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """All places of each name: a module that peft trains whole is there twice."""
    found: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    for name, place in pairs:
        if place not in found[name]:
            found[name] += (place,)
    return dict(found)


def _source(
    model: torch.nn.Module,
    folder: Path,
    places: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, torch.Tensor],
) -> Source:
    """The folder of a model, as transformers reads it or under the model's own names."""
    refuse_quantised(model, folder)
    files = open_folder(folder)
    if not huggingface.is_pretrained(model):
        return _checked(model, files, same_names(files.shapes), places, tensors, lambda *keys: keys)
    recipes = huggingface.conversions(model, files.shapes, places)
    return _checked(model, files, recipes, places, tensors, partial(huggingface.not_forgiven, model))


def _adapter_source(
    model: torch.nn.Module,
    folder: Path,
    places: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, torch.Tensor],
) -> Source:
    files = open_folder(folder, names=(adapters.WEIGHTS, adapters.INDEX))
    return _checked(model, files, same_names(files.shapes), places, tensors, lambda *keys: keys)


def _checked(
    model: torch.nn.Module,
    files: TensorFiles,
    recipes: Sequence[Recipe],
    places: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, torch.Tensor],
    not_forgiven: Callable[[set[str], set[str]], tuple[set[str], set[str]]],
) -> Source:
    """The source, if its keys are those of the model."""
    made = [shapes_made(recipe, files.shapes) for recipe in recipes]
    found = {name: shape for shapes in made for name, shape in shapes.items()}
    filled = {place for name in found for place in places.get(name, ())}
    missing = {name for name, held in places.items() if filled.isdisjoint(held)}
    missing, unexpected = not_forgiven(missing, set(found) - set(places))
    other_shapes = {
        misshapen(name, shape, tensors[place].shape)
        for name, shape in found.items()
        for place in places.get(name, ())
        if tensors[place].shape != shape
    }
    of_codes = {
        f"{shown(key)} for {name}"
        for recipe, shapes in zip(recipes, made, strict=True)
        for key in recipe.keys
        if key in files.no_floats
        for name in shapes
        if any(tensors[place].is_floating_point() for place in places.get(name, ()))
    }
    faults = listed(
        {
            "missing from the folder": missing,
            "unexpected in it": unexpected,
            "of another shape": other_shapes,
            "of whole numbers, flags or codes in the place of weights": of_codes,
        }
    )
    if faults:
        raise ConfigError(
            f"load={str(files.folder)!r} does not fit the {type(model).__name__}; {faults}. Load a folder "
            "of the same model, or fill the model yourself (from_pretrained, load_state_dict) and leave "
            "load= out"
        )
    return Source(files, tuple(zip(recipes, map(tuple, made), strict=True)), places)
