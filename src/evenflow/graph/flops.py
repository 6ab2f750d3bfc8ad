"""Floating point operations of kernels: torch's own formulas, and attention's."""

import math
from typing import Any

from torch.utils.flop_counter import flop_registry

# torch's formula is not for the CPU's kernel, nor, before 2.12, for fewer heads of keys than of queries.
_ATTENTION = frozenset(
    f"_scaled_dot_product_{kind}_attention{place}"
    for kind, place in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
)


def flops_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What a call of a kernel (an OpOverload) computes; 0 where nothing but memory is moved, or unknown.

    >>> import torch
    >>> x, y = torch.ones(2, 3), torch.ones(3, 5)
    >>> flops_of(torch.ops.aten.mm.default, (x, y), {}, x @ y)
    60
    """
    packet = kernel.overloadpacket
    if packet.__name__ in _ATTENTION:
        query, key, value = args[:3]
        # scores = query @ key^T, and scores @ value
        return 2 * int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
