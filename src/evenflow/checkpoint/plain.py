"""A tree of state as JSON and tensors: plain values stand in the one, numbers in the other, by a key.

JSON has no tuples, no keys but strings and no infinity; a mapping with one key that begins with `$` stands
for what it lacks. Nothing else is written or read, so that what comes from a stranger is data and no code.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from evenflow.errors import ConfigError
from evenflow.foreign import shown

_TENSOR, _TUPLE, _MAP, _COUNTER, _FLOAT = "$tensor", "$tuple", "$map", "$counter", "$float"


def encode(tree: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:  # any tree; JSON
    """The tree as JSON can hold it; its tensors go to `tensors`, under `key` (if any) and the path to them.

    Raises `ConfigError` for what is neither a plain value nor a tensor.

    >>> tensors = {}
    >>> encode({"w": {"step": torch.ones(()), "betas": (0.9, 0.99)}}, "optimizer", tensors)
    {'w': {'step': {'$tensor': 'optimizer.w.step'}, 'betas': {'$tuple': [0.9, 0.99]}}}
    >>> list(tensors)
    ['optimizer.w.step']
    """
    match tree:
        case None | bool() | int() | str():
            return tree
        case float():
            return float(tree) if math.isfinite(tree) else {_FLOAT: repr(float(tree))}
        case torch.Tensor():
            if key in tensors:
                raise ConfigError(f"two tensors of the run's state would be saved as {key}")
            if not key.isprintable():
                raise ConfigError(f"a tensor of the run's state would be saved as {key!r}: rename it")
            tensors[key] = tree.detach()
            return {_TENSOR: key}
        case list():
            return [encode(each, _under(key, at), tensors) for at, each in enumerate(tree)]
        case tuple():
            return {_TUPLE: [encode(each, _under(key, at), tensors) for at, each in enumerate(tree)]}
        case Counter():
            return {_COUNTER: _pairs(tree, key, tensors)}
        case Mapping():
            if all(isinstance(each, str) and not each.startswith("$") for each in tree):
                return {each: encode(value, _under(key, each), tensors) for each, value in tree.items()}
            return {_MAP: _pairs(tree, key, tensors)}
        case _:
            raise ConfigError(
                f"{key} of the run's state is a {type(tree).__name__}, and a checkpoint holds plain values "
                "and tensors: keep it out of the state_dict"
            )


def _under(key: str, each: object) -> str:
    return f"{key}.{each}" if key else str(each)


def _pairs(tree: Mapping[Any, Any], key: str, tensors: dict[str, torch.Tensor]) -> list[list[Any]]:
    for each in tree:
        if not _hashable(each):
            raise ConfigError(
                f"{key} of the run's state has a {type(each).__name__} as a key, and a checkpoint "
                "knows strings and numbers as such: keep it out of the state_dict"
            )
    return [
        [encode(each, _under(key, each), tensors), encode(value, _under(key, each), tensors)]
        for each, value in tree.items()
    ]


def decode(document: Any, tensor: Callable[[str], torch.Tensor]) -> Any:  # JSON; any tree
    """What `encode` was given; `tensor` finds what it put aside. Raises `ConfigError` for anything else.

    >>> decode({"betas": {"$tuple": [0.9, 0.99]}}, {}.__getitem__)
    {'betas': (0.9, 0.99)}
    """
    match document:
        case None | bool() | int() | str() | float():
            return document
        case list():
            return [decode(each, tensor) for each in document]
        case {"$tensor": str(key)} if len(document) == 1:
            return tensor(key)
        case {"$tuple": list(items)} if len(document) == 1:
            return tuple(decode(each, tensor) for each in items)
        case {"$map": list(pairs)} if len(document) == 1:
            return dict(_decoded(pairs, tensor))
        case {"$counter": list(pairs)} if len(document) == 1:
            return Counter(dict(_decoded(pairs, tensor)))
        case {"$float": "nan" | "inf" | "-inf" as text} if len(document) == 1:
            return float(text)
        case dict() if not any(each.startswith("$") for each in document):
            return {each: decode(value, tensor) for each, value in document.items()}
        case _:
            raise ConfigError(f"{shown(document)} is nothing that a state is made of")


def _decoded(pairs: list[Any], tensor: Callable[[str], torch.Tensor]) -> list[tuple[Any, Any]]:
    found = [decode(pair, tensor) for pair in pairs]
    if any(not isinstance(pair, list) or len(pair) != 2 or not _hashable(pair[0]) for pair in found):
        raise ConfigError(f"{shown(pairs)} are no pairs of a key and a value")
    return [(key, value) for key, value in found]


def _hashable(key: object) -> bool:
    return key is None or isinstance(key, str | int | float)


def keys_in(document: Any) -> set[str]:  # JSON
    """The keys of all tensors that a document speaks of.

    >>> sorted(keys_in({"a": {"$tensor": "x"}, "b": [{"$tensor": "y"}]}))
    ['x', 'y']
    """
    match document:
        case {"$tensor": str(key)}:
            return {key}
        case dict():
            return {key for value in document.values() for key in keys_in(value)}
        case list():
            return {key for value in document for key in keys_in(value)}
        case _:
            return set()


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of a run's processes as one.

    >>> parts = [{"step": 2, "model": {"a": 1}}, {"step": 2, "model": {"b": 2}}]
    >>> merged(parts)
    {'step': 2, 'model': {'a': 1, 'b': 2}}
    """
    whole = dict(states[0])
    for state in states[1:]:
        for key, value in state.items():
            if isinstance(value, Mapping):
                whole[key] = {**whole[key], **value}
    return whole
