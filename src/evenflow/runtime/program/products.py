"""Products with a weight in autograd's graph, whose backward computes the input's gradient and no other.

What the gradients of weight and bias take is put aside (`weight_grads`). Each kind of product makes the
kernel calls of torch's own formulas, so that every number has torch's bits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge

from evenflow.runtime.program.weight_grads import Grads, Target, WeightGrads


class Kind(NamedTuple):
    """How torch computes a product and its gradients; `more` are the function's own further arguments.

    `weight_grads` are those of weight and bias; it is told the bias's shape.
    """

    forward: Callable[..., torch.Tensor]  # of (stock, x, weight, bias, *more)
    input_grad: Callable[..., torch.Tensor]  # of (grad, x, weight, *more)
    weight_grads: Callable[..., Grads]  # of (grad, x, weight, shape or None, *more)
    is_cast: bool = True  # by autocast


class Product(NamedTuple):
    """A call of a product's function: its kind, what it is given, and its further arguments."""

    kind: Kind
    x: Any  # these three are whatever the caller gives: tensors, unless it errs
    weight: Any
    bias: Any
    more: tuple[Any, ...] = ()


class _PutOff(torch.autograd.Function):
    """A product whose backward computes the gradient of `x` and puts the rest aside.

    The graph ends in `anchor`, an empty leaf that gets no gradient, in the place of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004
        product: Product,
        stock: Callable[..., torch.Tensor],
        later: WeightGrads,
    ) -> torch.Tensor:
        ctx.kind, _, weight, bias, ctx.more = product
        ctx.later = later
        ctx.targets = _target(weight), None if bias is None else _target(bias)
        ctx.dtype, ctx.bias_shape = x.dtype, None if bias is None else bias.shape
        given, used, added = _cast(x, weight, bias) if ctx.kind.is_cast else (x, weight, bias)
        ctx.save_for_backward(given, used)
        ctx.set_materialize_grads(False)
        return ctx.kind.forward(stock, given, used, added, *ctx.more)  # type: ignore[no-any-return]  # (ctx is torch's)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        assert not torch.is_grad_enabled(), "the gradient of a gradient: such nodes are not put off"
        (grad,) = grads
        if grad is None:
            return None, None, None, None, None
        # Without their graphs, which would hold what is put aside in a circle that nobody can break.
        x, weight, grad = (tensor.detach() for tensor in (*ctx.saved_tensors, grad))
        ctx.later.put(ctx.targets, partial(ctx.kind.weight_grads, grad, x, weight, ctx.bias_shape, *ctx.more))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return ctx.kind.input_grad(grad, x, weight, *ctx.more).to(ctx.dtype), None, None, None, None


def put_off(
    later: WeightGrads, anchor: torch.Tensor, stock: Callable[..., torch.Tensor], product: Product
) -> torch.Tensor:
    """The product by its own function, with the gradients of weight and bias put off.

    `anchor` is a leaf on their device.
    """
    return _PutOff.apply(product.x, anchor, product, stock, later)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves `apply` untyped


def _target(weight: torch.Tensor) -> Target:
    return get_gradient_edge(weight) if weight.requires_grad else None


def _cast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors as autocast would hand them to the kernel."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def lower(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)

    return lower(x), lower(weight), None if bias is None else lower(bias)


# -- the kinds of products


def _with_gradients(
    stock: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, *others: Any
) -> torch.Tensor:
    """What the function gives where gradients are on: torch chooses some kernels by that."""
    with torch.enable_grad():
        return stock(x.detach(), weight.detach().requires_grad_(), *others).detach()


def _linear_forward(
    stock: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return stock(x, weight, bias) if x.is_contiguous() else _with_gradients(stock, x, weight, bias)


def _linear_input_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return _grad_of_left(grad_rows, rows, weight.t()).view(x.shape)


def _linear_weight_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_shape: torch.Size | None
) -> Grads:
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    # Where torch adds the bias in another kernel, its gradient is not summed in rows.
    in_rows = x.dim() == 2 or x.is_contiguous()
    of_bias = _summed(grad_rows if in_rows else grad, bias_shape)
    return _grad_of_right(grad_rows, rows, weight.t()).t(), of_bias


def _addmm_forward(
    stock: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return stock(bias, x, weight)


def _addmm_weight_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_shape: torch.Size | None
) -> Grads:
    return _grad_of_right(grad, x, weight), _summed(grad, bias_shape)


def _convolution_grads(
    wanted: Sequence[bool],
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_shape: torch.Size | None,
    *more: Any,
) -> Grads:
    stride, padding, dilation, groups = more
    num_dims = weight.dim() - 2
    sizes = [_each(size, num_dims) for size in (stride, padding, dilation)]
    shape = None if bias_shape is None else list(bias_shape)
    made: Grads = torch.ops.aten.convolution_backward(
        *(grad, x, weight, shape, *sizes), False, [0] * num_dims, groups, wanted
    )
    return made


def _each(size: int | Sequence[int], number: int) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * number if len(sizes) == 1 else sizes


def _convolution_input_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *more: Any
) -> torch.Tensor:
    made, _, _ = _convolution_grads((True, False, False), grad, x, weight, None, *more)
    assert made is not None, "it was asked for"
    return made


def _convolution_weight_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_shape: torch.Size | None, *more: Any
) -> Grads:
    wanted = (False, True, bias_shape is not None)
    return _convolution_grads(wanted, grad, x, weight, bias_shape, *more)[1:]


def _grouped_forward(
    stock: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, _: None, ends: torch.Tensor
) -> torch.Tensor:
    return stock(x, weight, offs=ends)


def _grouped_input_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    if _is_by_columns(x):
        return torch._grouped_mm(weight, grad.transpose(-2, -1), offs=ends).transpose(-2, -1)  # noqa: SLF001 (its only name)
    return torch._grouped_mm(grad, weight.transpose(-2, -1), offs=ends)  # noqa: SLF001


def _grouped_weight_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, _: None, ends: torch.Tensor
) -> Grads:
    if _is_by_columns(weight):
        return torch._grouped_mm(grad.transpose(-2, -1), x, offs=ends).transpose(-2, -1), None  # noqa: SLF001
    return torch._grouped_mm(x.transpose(-2, -1), grad, offs=ends), None  # noqa: SLF001


def _grad_of_left(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The gradient of `left` in `left @ right`, all of them matrices."""
    if _is_by_columns(left):
        return right.mm(grad.t()).t()
    return grad.mm(right.t())


def _grad_of_right(grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The gradient of `right` in `left @ right`."""
    if _is_by_columns(right):
        return grad.t().mm(left).t()
    return left.t().mm(grad)


def _is_by_columns(matrix: torch.Tensor) -> bool:
    return matrix.stride(-2) == 1 and matrix.stride(-1) == matrix.shape[-2]


def _summed(grad: torch.Tensor, bias_shape: torch.Size | None) -> torch.Tensor | None:
    """The gradient of what was added to every row, in memory of its own."""
    if bias_shape is None:
        return None
    summed = grad.sum_to_size(bias_shape)
    return summed.clone() if summed.data_ptr() == grad.data_ptr() else summed


LINEAR = Kind(_linear_forward, _linear_input_grad, _linear_weight_grads)
ADDMM = Kind(_addmm_forward, _grad_of_left, _addmm_weight_grads)
CONVOLUTION = Kind(_with_gradients, _convolution_input_grad, _convolution_weight_grads)
GROUPED = Kind(_grouped_forward, _grouped_input_grad, _grouped_weight_grads, is_cast=False)
