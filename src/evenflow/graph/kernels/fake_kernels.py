"""Kernels on fake tensors, where torch's own fake implementations give up though the answer is known.

A grouped matrix product of another type than bfloat16 (torch's fake kernel knows only that); a boolean
index that is itself real (how many rows it picks is known, whatever they hold); and kernels that have no
fake implementation, or one that wants numbers, though only the real ones among their inputs decide the form
of the result (lengths of sequences, say): those run on zeros and on ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from evenflow.graph.kernels.fakes import fake_like
from evenflow.graph.kernels.kernels import MASKS

_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)
_CANNOT = (UnsupportedOperatorException, DataDependentOutputException, DynamicOutputShapeException)
# The most memory, in bytes, that a kernel's inputs may take for its run on real numbers.
MAX_BYTES = 2**30


def run_kernel(
    kernel: Any,  # an OpOverload
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: FakeTensorMode | None = None,
) -> tuple[Any, list[torch.Tensor]]:
    """Call a kernel, of whose tensors some may be fake; raises what the kernel raises.

    With a `mode` all that it makes is fake. Also returns the real tensors whose numbers decide the form of a
    fake result.
    """
    packet = kernel.overloadpacket
    if packet is _GROUPED and isinstance(args[0], FakeTensor) and args[0].dtype is not torch.bfloat16:
        return _grouped(kernel, args, kwargs), []
    if kernel is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
        args = (args[0], _positions(args[1]))
    elif (
        kernel is torch.ops.aten.masked_select.default
        and _is_mask(args[1])
        and isinstance(args[0], FakeTensor)
    ):
        whole = torch.broadcast_shapes(args[0].shape, args[1].shape)
        positions = list(args[1].expand(whole).nonzero().unbind(1))
        kernel, args = torch.ops.aten.index.Tensor, (args[0].expand(whole), positions)
    mode = mode or next((each.fake_mode for each in args if type(each) is FakeTensor), None)
    try:
        if mode is None:
            return kernel(*args, **kwargs), []
        # Two turns through torch's dispatcher would come to the same, in half as much time again.
        return mode.dispatch(kernel, (FakeTensor,), _all_fake(kernel, args, mode), kwargs), []
    except _CANNOT:
        results = _on_numbers(kernel, args, kwargs)
        if results is None:
            raise
        given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        result = results[0] if len(kernel._schema.returns) == 1 else tuple(results)
        return result, [tensor for tensor in given if not isinstance(tensor, FakeTensor)]


def _all_fake(kernel: Any, args: tuple[Any, ...], mode: FakeTensorMode) -> tuple[Any, ...]:
    """Arguments of which no tensor is real: torch then knows many results from an earlier call."""
    schema = kernel._schema
    if not any(map(_is_ordinary, args)) or schema.is_mutable or any(r.alias_info for r in schema.returns):
        return args
    return tuple(fake_like(e, mode, e.device, e.dtype) if _is_ordinary(e) else e for e in args)


def _is_ordinary(leaf: Any) -> bool:  # leaf: anything
    """Whether a leaf is a real tensor of which a kernel's fake run needs the form alone."""
    plain = type(leaf) is torch.Tensor and leaf.layout is torch.strided and leaf.dim() > 0
    return plain and not (leaf.is_conj() or leaf.is_neg() or leaf.is_quantized)


def _grouped(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wanted = args[0].dtype

    def changed(leaf: Any, before: torch.dtype, after: torch.dtype) -> Any:  # leaf: anything
        return leaf.to(after) if isinstance(leaf, torch.Tensor) and leaf.dtype is before else leaf

    args, kwargs = pytree.tree_map(lambda leaf: changed(leaf, wanted, torch.bfloat16), (args, kwargs))
    return changed(kernel(*args, **kwargs), torch.bfloat16, wanted)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype in MASKS


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same index with the positions that real masks pick in their place."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        found.extend(index.nonzero().unbind(1) if index is not None and _is_mask(index) else (index,))
    return found


def run_padding(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[torch.Tensor]]:
    """Call `_pad_packed_sequence`, which writes fakes into a new tensor that would be taken for real.

    Also returns the real tensors among the results: the lengths, which the fakes do not decide.
    """
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    with _disable_current_modes(), torch.no_grad():
        found = _on_numbers(function, args, kwargs) if fakes else None
    if found is None:
        return function(*args, **kwargs), []
    trains = torch.is_grad_enabled() and any(fake.requires_grad for fake in fakes)
    made = (
        leaf.requires_grad_().clone() if trains and isinstance(leaf, FakeTensor) else leaf for leaf in found
    )
    return tuple(made), [leaf for leaf in found if not isinstance(leaf, FakeTensor)]


def _on_numbers(
    kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor] | None:
    """All that a kernel returns where fakes are zeros, if it is of the same form where they are ones.

    A result that has the same numbers both times is real: only real inputs decide it. The others are fake.
    """
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if sum(fake.numel() * fake.element_size() for fake in fakes) > MAX_BYTES:
        return None
    zeros = _run(kernel, args, kwargs, lambda tensor: tensor.zero_())
    ones = _run(kernel, args, kwargs, lambda tensor: tensor.fill_(1))
    if any(not isinstance(leaf, torch.Tensor) for leaf in zeros) or list(map(_form, zeros)) != list(
        map(_form, ones)
    ):
        return None
    mode = fakes[0].fake_mode
    return [
        a if torch.equal(a, b) and a.numel() else mode.from_tensor(a)
        for a, b in zip(zeros, ones, strict=True)
    ]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _run(
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fill: Callable[[torch.Tensor], torch.Tensor],
) -> list[Any]:
    def real(leaf: Any) -> Any:  # anything
        if not isinstance(leaf, FakeTensor):
            return leaf
        return fill(torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.fake_device))

    real_args, real_kwargs = pytree.tree_map(real, (args, kwargs))
    result = kernel(*real_args, **real_kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]
