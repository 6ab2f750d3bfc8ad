"""Argument trees with references: how a recorded call's arguments and results are written down.

A template is a pytree whose tensor leaves were replaced by `Ref`s to values of the graph. Filling it
with an environment gives the arguments back. Mutable objects that are neither tensors nor containers
(a key/value cache, say) become `Shared`: each microbatch gets one fresh copy of each on every stage.
"""

import copy
import dataclasses
import enum
import functools
import types
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

# Leaves that may be repeated as they stand: nobody can change them under us.
IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type, enum.Enum, type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.nn.Module),
    functools.partial,
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for the value with this number."""

    value: int


@dataclass(frozen=True, slots=True)
class Shared:
    """Stands for a mutable object: a fresh copy of `prototype` for each stage and microbatch.

    `keep` maps the ids of what is never copied (the model's modules) to itself.
    """

    number: int
    prototype: Any  # any object that the program hands around
    keep: dict[int, Any]  # as deepcopy's memo

    def among(self, shared: dict[int, Any]) -> Any:  # as `prototype`
        """The microbatch's copy: the one in `shared`, where it is put if that has none yet."""
        if self.number not in shared:
            shared[self.number] = copy.deepcopy(self.prototype, dict(self.keep))
        return shared[self.number]


@dataclass(frozen=True, slots=True)
class Shell:
    """Stands for an object that holds tensors: a copy of `prototype` with those in place of its `Ref`s."""

    prototype: Any  # any object
    refs: tuple[Ref, ...]  # those in it, by identity
    keep: dict[int, Any]  # as deepcopy's memo

    def renamed(self, old: int, new: int) -> "Shell":
        """The same object, with a value under another number."""
        refs = {id(ref): Ref(new) if ref.value == old else ref for ref in self.refs}
        return Shell(copy.deepcopy(self.prototype, self.keep | refs), tuple(refs.values()), self.keep)

    def filled(self, values: Mapping[int, Any]) -> Any:  # as `prototype`
        """The copy with these values in it."""
        return copy.deepcopy(self.prototype, self.keep | {id(ref): values[ref.value] for ref in self.refs})


@dataclass(frozen=True, slots=True)
class Template:
    """A tree with `Ref`, `Shared` and `Shell` leaves among its plain ones.

    `refs` are the numbers of the values in it, in order of appearance, repeats included.
    """

    leaves: tuple[Any, ...]  # leaves are whatever the program passes
    spec: pytree.TreeSpec
    refs: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: list[int] = []
        for leaf in self.leaves:
            if isinstance(leaf, Ref):
                found.append(leaf.value)
            elif isinstance(leaf, Shell):
                found.extend(ref.value for ref in leaf.refs)
        object.__setattr__(self, "refs", tuple(found))

    @classmethod
    def of_values(cls, values: Iterable[int]) -> "Template":
        """A list of values."""
        leaves, spec = pytree.tree_flatten([Ref(value) for value in values])
        return cls(tuple(leaves), spec)

    def unfilled(self) -> Any:
        """The tree with its stand-ins where they are."""
        return pytree.tree_unflatten(list(self.leaves), self.spec)

    def rewrite(self, change: Callable[[Any], Any]) -> "Template":
        """The same tree with `change` applied to every leaf."""
        return Template(tuple(change(leaf) for leaf in self.leaves), self.spec)

    def fill(self, values: Mapping[int, Any], shared: dict[int, Any]) -> Any:
        """The tree with values and shared objects in place; copies an object that `shared` lacks into it.

        `values` maps value numbers to tensors. Raises `KeyError` when a value is missing.
        """
        filled = []
        for leaf in self.leaves:
            match leaf:
                case Ref(value):
                    filled.append(values[value])
                case Shared():
                    filled.append(leaf.among(shared))
                case Shell():
                    filled.append(leaf.filled(values))
                case _:
                    filled.append(leaf)
        return pytree.tree_unflatten(filled, self.spec)


def flatten_tree(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:  # any tree
    """Leaves and structure of a tree.

    Dataclasses on the way, and mappings like transformers' `BatchEncoding`, become part of it for good.
    """
    leaves: list[Any] = []
    shape = _shape(tree, leaves)
    return (leaves, _spec(shape)) if shape is not None else _flatten_any(tree)


# What most arguments are: none of these holds others.
_LEAVES = frozenset(
    {type(None), bool, int, float, str, slice, type(Ellipsis), torch.dtype, torch.device, types.FunctionType}
    | {torch.Tensor, torch.nn.Parameter, FakeTensor}
)
_LEAF = 0  # where a `_Shape` has a leaf
_Shape: TypeAlias = Any  # nested tuples: (tuple, *inside), (list, *inside), (dict, keys, *inside)


def _shape(tree: Any, leaves: list[Any]) -> _Shape | None:
    """What makes up a tree of plain containers, whose leaves are appended; nothing for another tree."""
    kind = type(tree)
    if kind in _LEAVES:
        leaves.append(tree)
        return _LEAF
    shape: list[Any] = [kind]
    if kind is dict and all(type(key) is str for key in tree):
        shape.append(tuple(tree))
        tree = tree.values()
    elif kind is not tuple and kind is not list:
        return None
    for each in tree:
        if type(each) in _LEAVES:  # not asked of itself: most are
            leaves.append(each)
            shape.append(_LEAF)
            continue
        shape.append(_shape(each, leaves))
        if shape[-1] is None:
            return None
    return tuple(shape)


@functools.lru_cache(maxsize=2**12)
def _spec(shape: _Shape) -> pytree.TreeSpec:
    """The structure of such a tree: pytree's own walk takes ten times as long."""
    return pytree.tree_flatten(_like(shape))[1]


def _like(shape: _Shape) -> Any:  # a tree of that shape
    if shape == _LEAF:
        return None
    if shape[0] is dict:
        return dict(zip(shape[1], map(_like, shape[2:]), strict=True))
    return shape[0](map(_like, shape[1:]))


def _flatten_any(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:  # any tree
    leaves, spec = pytree.tree_flatten(tree)
    dataclass_kinds = {
        type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, IMMUTABLE)
    }
    mapping_kinds = {type(leaf) for leaf in leaves if isinstance(leaf, UserDict)} - dataclass_kinds
    for kind in dataclass_kinds:
        _register(kind)
    for mapping_kind in mapping_kinds:
        _register_mapping(mapping_kind)
    return _flatten_any(tree) if dataclass_kinds or mapping_kinds else (leaves, spec)


def _register(kind: type[Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]

    def unflatten(values: Iterable[Any], _: Any) -> Any:
        made = object.__new__(kind)  # not kind(…): what its __init__ would do was done when it was made
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
        return made

    pytree.register_pytree_node(
        kind,
        lambda made: ([getattr(made, name) for name in names], None),
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=lambda made: ([(pytree.GetAttrKey(n), getattr(made, n)) for n in names], None),
    )


def _register_mapping(kind: type[Any]) -> None:
    def unflatten(values: Iterable[Any], keys: tuple[Any, ...]) -> Any:
        return kind(dict(zip(keys, values, strict=True)))

    pytree.register_pytree_node(
        kind,
        lambda made: (list(made.data.values()), tuple(made.data)),
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=lambda made: (
            [(pytree.MappingKey(key), value) for key, value in made.data.items()],
            tuple(made.data),
        ),
    )


NOTHING = Template((), pytree.tree_flatten(())[1])


def is_tensor(leaf: object) -> bool:
    """Whether a leaf of a tree is a tensor."""
    return isinstance(leaf, torch.Tensor)


def is_plain(leaf: object) -> bool:
    """Whether a leaf may be repeated as it stands."""
    return isinstance(leaf, IMMUTABLE)
