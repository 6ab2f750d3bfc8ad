"""Comparing what two runs made: tensors, and trees with tensors and plain values in them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from evenflow.graph.nouns.template import flatten_tree

INFINITE = float("inf")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape and type, as a share of the largest expected number.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    found, expected = (one.to_dense() if one.layout != torch.strided else one for one in (found, expected))
    other = found != expected
    if found.is_floating_point() or found.is_complex():
        other &= ~(found.isnan() & expected.isnan())
    if not bool(other.any()):
        return 0.0
    wide = torch.complex128 if found.is_complex() else torch.float64
    largest = expected.to(wide).abs().max()
    share = float((found[other].to(wide) - expected[other].to(wide)).abs().max() / largest)
    return share if share == share and share > 0 else INFINITE  # noqa: PLR0124 (NaN is not itself)


def compared(found: Any, expected: Any) -> tuple[float, str]:
    """(difference, what else differs) of two leaves: tensors, or plain values, which are equal or not.

    >>> compared(torch.zeros(2), torch.zeros(3))
    (inf, 'float32[2] against float32[3]')
    >>> compared(1, 1.0)
    (inf, 'int against float')
    """
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return INFINITE, f"{_form(found)} against {_form(expected)}"
        return difference(found, expected.to(found.device)), ""
    if type(found) is not type(expected):
        return INFINITE, f"{_kind(found)} against {_kind(expected)}"
    if isinstance(found, float) and isinstance(expected, float):
        share = difference(torch.tensor(found), torch.tensor(expected))
        return (
            (share or INFINITE, f"{found} against {expected}") if repr(found) != repr(expected) else (0.0, "")
        )
    # An object without an equality of its own is made anew by each run: only its type can be compared.
    if not _has_equality(found) or found == expected:
        return 0.0, ""
    return INFINITE, f"{found!r} against {expected!r}"


def leaves_compared(found: Any, expected: Any) -> Iterator[tuple[str, float, str]]:
    """For each leaf of two trees its path, and what `compared` says; one line where the trees differ.

    >>> list(leaves_compared({"a": 1}, {"a": 1}))
    [("['a']", 0.0, '')]
    """
    (_, mine), (_, theirs) = flatten_tree(found), flatten_tree(expected)
    if mine != theirs:
        yield "", INFINITE, f"{_kind(found)} against {_kind(expected)} of another form"
        return
    pairs = zip(*(pytree.tree_flatten_with_path(tree)[0] for tree in (found, expected)), strict=True)
    for (path, leaf), (_, other) in pairs:
        yield pytree.keystr(path), *compared(leaf, other)


def _has_equality(thing: Any) -> bool:
    return any("__eq__" in vars(kind) for kind in type(thing).__mro__ if kind is not object)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _kind(thing: Any) -> str:
    return "nothing" if thing is None else type(thing).__name__
