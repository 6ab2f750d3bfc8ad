"""Kernels on fake tensors, where torch's own fake implementations give up though the answer is known.

Three kinds: a grouped matrix product of another type than bfloat16 (torch's fake kernel knows only that);
a boolean index that is itself real (how many rows it picks is known, whatever they hold); and kernels
without a fake implementation, whose result is described by one run on real zeros.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.utils import _pytree as pytree

_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)
_MASKS = (torch.bool, torch.uint8)
# The most memory, in bytes, that a kernel's inputs may take for its run on zeros.
MAX_ZEROS = 2**30


def run_kernel(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # kernel: an OpOverload
    """Call a kernel, of whose tensors some may be fake; raises what the kernel raises."""
    packet = kernel.overloadpacket
    if packet is _GROUPED and isinstance(args[0], FakeTensor) and args[0].dtype is not torch.bfloat16:
        return _grouped(kernel, args, kwargs)
    if kernel is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
        args = (args[0], _positions(args[1]))
    elif (
        kernel is torch.ops.aten.masked_select.default
        and _is_mask(args[1])
        and isinstance(args[0], FakeTensor)
    ):
        whole = torch.broadcast_shapes(args[0].shape, args[1].shape)
        kernel, args = (
            torch.ops.aten.index.Tensor,
            (args[0].expand(whole), list(args[1].expand(whole).nonzero().unbind(1))),
        )
    try:
        return kernel(*args, **kwargs)
    except UnsupportedOperatorException:
        return _on_zeros(kernel, args, kwargs)


def _grouped(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wanted = args[0].dtype

    def changed(leaf: Any, before: torch.dtype, after: torch.dtype) -> Any:  # leaf: anything
        return leaf.to(after) if isinstance(leaf, torch.Tensor) and leaf.dtype is before else leaf

    args, kwargs = pytree.tree_map(lambda leaf: changed(leaf, wanted, torch.bfloat16), (args, kwargs))
    return changed(kernel(*args, **kwargs), torch.bfloat16, wanted)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype in _MASKS


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same index with the positions that real masks pick in their place."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        found.extend(index.nonzero().unbind(1) if index is not None and _is_mask(index) else (index,))
    return found


def _on_zeros(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a kernel returns for zeros in place of every fake, as fakes."""
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if sum(fake.numel() * fake.element_size() for fake in fakes) > MAX_ZEROS:
        return kernel(*args, **kwargs)  # raises again, and says what is missing

    def real(leaf: Any) -> Any:  # anything
        if not isinstance(leaf, FakeTensor):
            return leaf
        empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.fake_device)
        return empty.zero_()

    real_args, real_kwargs = pytree.tree_map(real, (args, kwargs))
    result = kernel(*real_args, **real_kwargs)
    mode = fakes[0].fake_mode
    return pytree.tree_map(
        lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, result
    )
