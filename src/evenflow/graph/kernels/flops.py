"""Floating point operations of kernels: torch's own formulas, and those that it lacks."""

import math
from typing import Any

from torch.utils.flop_counter import flop_registry

# torch's formula is not for the CPU's kernel, nor, before 2.12, for fewer heads of keys than of queries.
_ATTENTION = frozenset(
    f"_scaled_dot_product_{kind}_attention{place}"
    for kind, place in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
)

# Products of matrices that torch has no formula for; a mixture of experts runs on grouped ones. The last is
# transformers' own, where torch's cannot run. Where the two matrices stand among the arguments.
_PRODUCTS = {
    "_grouped_mm": 0,
    "_scaled_grouped_mm": 0,
    "_scaled_grouped_mm_v2": 0,
    "grouped_mm_fallback": 0,
    "_scaled_mm_v2": 0,
    "_int_mm": 0,
    "mv": 0,
    "dot": 0,
    "vdot": 0,
    "addmv": 1,
    "addbmm": 1,
    "_addmm_activation": 1,
}


def flops_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What a call of a kernel (an OpOverload) computes; 0 where nothing but memory is moved, or unknown.

    >>> import torch
    >>> x, y = torch.ones(2, 3), torch.ones(3, 5)
    >>> flops_of(torch.ops.aten.mm.default, (x, y), {}, x @ y)
    60
    """
    packet = kernel.overloadpacket
    if packet.__name__ in _PRODUCTS:
        first = _PRODUCTS[packet.__name__]
        return _product(args[first], args[first + 1])
    if packet.__name__ in _ATTENTION:
        query, key, value = args[:3]
        # scores = query @ key^T, and scores @ value
        return 2 * int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


def _product(left: Any, right: Any) -> int:  # tensors
    """Of the product of two matrices, vectors, or stacks or groups of matrices.

    Where one of two is a stack, each row (or column) of the other meets one matrix of it; where none is, in
    groups, each column of `left` meets one row of `right`.
    """
    if left.dim() == 3 and right.dim() == 2:  # each column of `right` with one matrix of the stack
        return 2 * int(math.prod(left.shape[1:])) * int(right.shape[-1])
    return 2 * int(left.numel()) * (int(right.shape[-1]) if right.dim() > 1 else 1)
