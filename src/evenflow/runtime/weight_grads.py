"""Weight gradients put off: a backward in two parts, for the price of one.

`InputGrad` is one ordinary walk of autograd's graph. In it, a matrix product or a convolution computes the
gradient of its input alone, and puts aside what the gradient of its weight takes: its input and the gradient
of its result. `WeightGrad` computes those gradients and adds them to the parameters', as autograd would have.
Both make the kernel calls of torch's own formulas (`mm_mat1_backward`, `mm_mat2_backward`, and
`convolution_backward` of torch/csrc/autograd/FunctionsManual.cpp and derivatives.yaml), so every number has
the same bits. Nothing is computed twice, and what a forward has saved is let go of in the `InputGrad`, but
for what was put aside.

What is not a product with a parameter (a normalisation's scale, an embedding, an expert chosen by numbers, a
module whose inside was not seen) gets its gradient in the `InputGrad`. A parameter is put off in all of its
uses or in none (`graph.weight_uses`), so that its gradients add up in the order of microbatches.

Rejected: to walk the graph twice, first to the inputs alone and then whole (that was here before): the walk
to the inputs was paid for twice. To compute all in the `InputGrad` and put the gradients aside: nothing of
the work would move, and each microbatch on its way would hold a copy of all gradients.
"""

import importlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, update_wrapper
from typing import Any

import torch
from torch.nn import functional

Grads = tuple[torch.Tensor | None, ...]
_Job = tuple[tuple[torch.nn.Parameter | None, ...], Callable[[], Grads]]  # parameters, and their gradients


class WeightGrads:
    """What one microbatch of one stage has put aside. While it is not `open`, nothing is put there.

    >>> later, weight = WeightGrads(), torch.nn.Parameter(torch.ones(1, 2))
    >>> later.put((weight,), lambda: (torch.full((1, 2), 3.0),))
    >>> later.run()
    >>> weight.grad
    tensor([[3., 3.]])
    """

    def __init__(self) -> None:
        self.open = False
        self._jobs: list[_Job] = []

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def put(self, parameters: tuple[torch.nn.Parameter | None, ...], grads: Callable[[], Grads]) -> None:
        """Put a computation aside; `grads` gives a gradient for each parameter, or None where it is None."""
        self._jobs.append((parameters, grads))

    @torch.no_grad()
    def run(self) -> None:
        """Compute what was put aside, and let go of it.

        As in autograd's walk, the uses of one parameter in a microbatch are summed in the order in which the
        walk came to them, and then added to what earlier microbatches left.
        """
        uses = Counter(id(each) for parameters, _ in self._jobs for each in parameters)
        sums: dict[int, torch.Tensor] = {}
        self._jobs.reverse()
        while self._jobs:
            parameters, grads = self._jobs.pop()
            for parameter, grad in zip(parameters, grads(), strict=True):
                if parameter is None or grad is None:
                    continue
                key = id(parameter)
                total = sums.pop(key) + grad if key in sums else grad
                uses[key] -= 1
                if uses[key]:
                    sums[key] = total
                else:
                    _accumulate(parameter, total)


class Deferral:
    """The parameters of a stage whose gradients are put off, and where those of the running forward go."""

    def __init__(self) -> None:
        self.into = WeightGrads()
        self._parameters: dict[int, torch.nn.Parameter] = {}  # by id
        self._refused: dict[int, torch.nn.Parameter] = {}

    def learn(self, splittable: Iterable[torch.nn.Parameter], others: Iterable[torch.nn.Parameter]) -> None:
        """Take what one more recording says of the stage's parameters; one word against it is enough."""
        self._refused.update((id(each), each) for each in others)
        self._parameters.update((id(each), each) for each in splittable if type(each) is torch.nn.Parameter)
        for key in self._refused:
            self._parameters.pop(key, None)

    def __enter__(self) -> None:
        """Let torch's own functions put off, when they are called by this thread."""
        _LOCAL.deferral = self
        _PATCH.enter()

    def __exit__(self, *_: object) -> None:
        _PATCH.leave()
        _LOCAL.deferral = None

    def own(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The function that puts off what it can, in the place of one of torch's; None for any other."""
        rule = _RULES.get(function)
        return None if rule is None else partial(rule, self, function)

    def takes(self, x: object, weight: object, bias: object) -> bool:
        """Whether the gradients of these are put off."""
        return (
            id(weight) in self._parameters
            and torch.is_grad_enabled()
            and self._parameters[id(weight)].requires_grad
            and isinstance(x, torch.Tensor)
            and x.layout is torch.strided
            and not _has_hooks(self._parameters[id(weight)])
            and (bias is None or id(bias) in self._parameters)
            and (bias is None or not _has_hooks(self._parameters[id(bias)]))
        )


def _has_hooks(parameter: torch.nn.Parameter) -> bool:
    # torch has no public way to ask.
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _accumulate(parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Add to a parameter's gradient as autograd's `AccumulateGrad` does: laid out as the parameter."""
    if not parameter.requires_grad:
        return
    grad = grad.to(parameter.dtype)
    if parameter.grad is not None:
        parameter.grad.add_(grad)
    elif grad.stride() == parameter.stride():
        parameter.grad = grad
    else:
        parameter.grad = torch.empty_like(parameter).copy_(grad)


# -- torch's functions


def _linear(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002 (torch's own name, for those who call by name)
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if not deferral.takes(input, weight, bias):
        return stock(input, weight, bias)
    return _Linear.apply(input, weight, bias, deferral.into, stock)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves `apply` untyped


def _addmm(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002 (as above)
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    **scales: Any,
) -> torch.Tensor:
    if scales or not deferral.takes(mat1, mat2, input):
        return stock(input, mat1, mat2, **scales)
    return _Addmm.apply(mat1, mat2, input, deferral.into, stock)  # type: ignore[no-untyped-call, no-any-return]  # as above


def _convolution(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002 (as above)
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,  # (a number, or one for each dimension, as the next two)
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    num_dims = weight.dim() - 2
    whole = (
        isinstance(padding, str) or input.dim() != weight.dim()
    )  # padded first; a batch of one without dim
    if whole or not deferral.takes(input, weight, bias):
        return stock(input, weight, bias, stride, padding, dilation, groups)
    sizes = [_each(size, num_dims) for size in (stride, padding, dilation)]
    return _Convolution.apply(input, weight, bias, deferral.into, stock, sizes, groups)  # type: ignore[no-untyped-call, no-any-return]  # as above


def _each(size: int | Sequence[int], number: int) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * number if len(sizes) == 1 else sizes


_Rule = Callable[..., torch.Tensor]
_RULES: Mapping[Callable[..., Any], _Rule] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    functional.conv3d: _convolution,
}
_PLACES: tuple[tuple[Any, str], ...] = (
    (functional, "linear"),
    (torch, "addmm"),
    (functional, "conv1d"),
    (functional, "conv2d"),
    (functional, "conv3d"),
)


class _Local(threading.local):
    deferral: Deferral | None = None


_LOCAL = _Local()


class _Patch:
    """torch's functions, replaced while any thread's stage runs a module whose inside is to put off.

    For all threads at once, as there is one torch; each call looks whether its own thread has a deferral. A
    `TorchFunctionMode` would be each thread's own, but it takes some microseconds of every torch function.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stock: list[Callable[..., Any]] = []

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                # It makes tables of torch's functions, and torch imports it whenever it comes to need it.
                importlib.import_module("torch._dynamo")
                self._stock = [getattr(module, name) for module, name in _PLACES]
                for (module, name), stock in zip(_PLACES, self._stock, strict=True):
                    if stock in _RULES:
                        setattr(module, name, update_wrapper(partial(_routed, _RULES[stock], stock), stock))

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for (module, name), stock in zip(_PLACES, self._stock, strict=True):
                    setattr(module, name, stock)


def _routed(rule: _Rule, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # as `stock`
    deferral = _LOCAL.deferral
    return stock(*args, **kwargs) if deferral is None else rule(deferral, stock, *args, **kwargs)


_PATCH = _Patch()


# -- their gradients


class _Linear(torch.autograd.Function):
    """`functional.linear`; `x` of any number of dimensions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        later: WeightGrads,
        stock: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        given, used, added = _cast(x, weight, bias)
        ctx.save_for_backward(given, used)
        ctx.weight, ctx.bias, ctx.later, ctx.dtype = weight, bias, later, x.dtype
        ctx.set_materialize_grads(False)
        return _as_with_gradients(stock, given, used, added)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        (grad,) = grads
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        rows, right = x.reshape(-1, x.shape[-1]), weight.t()
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_of_left(grad_rows, rows, right).view(x.shape).to(ctx.dtype)
        # Where torch adds the bias in another kernel, its gradient is not summed in rows.
        in_rows = x.dim() == 2 or x.is_contiguous()
        make = partial(_linear_grads, grad_rows, rows, right, grad_rows if in_rows else grad, ctx.bias)
        return grad_x, *_put_off(ctx, make), None, None


def _linear_grads(
    grad_rows: torch.Tensor,
    rows: torch.Tensor,
    right: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None,
) -> Grads:
    return _grad_of_right(grad_rows, rows, right).t(), _summed(grad, bias)


class _Addmm(torch.autograd.Function):
    """`torch.addmm` of a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter,
        later: WeightGrads,
        stock: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        given, used, added = _cast(x, weight, bias)
        ctx.save_for_backward(given, used)
        ctx.weight, ctx.bias, ctx.later, ctx.dtype = weight, bias, later, x.dtype
        ctx.set_materialize_grads(False)
        return stock(added, given, used)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        (grad,) = grads
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        grad_x = _grad_of_left(grad, x, weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, *_put_off(ctx, partial(_addmm_grads, grad, x, weight, ctx.bias)), None, None


def _addmm_grads(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Grads:
    return _grad_of_right(grad, x, weight), _summed(grad, bias)


class _Convolution(torch.autograd.Function):
    """`functional.conv1d`, `conv2d` and `conv3d` of a batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        later: WeightGrads,
        stock: Callable[..., torch.Tensor],
        sizes: list[list[int]],
        groups: int,
    ) -> torch.Tensor:
        given, used, added = _cast(x, weight, bias)
        ctx.save_for_backward(given, used)
        ctx.weight, ctx.bias, ctx.later, ctx.dtype = weight, bias, later, x.dtype
        ctx.sizes, ctx.groups = sizes, groups
        ctx.set_materialize_grads(False)
        return _as_with_gradients(stock, given, used, added, *sizes, groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        (grad,) = grads
        if grad is None:
            return None, None, None, None, None, None, None
        x, weight = ctx.saved_tensors
        how = (
            None if ctx.bias is None else list(ctx.bias.shape),
            *ctx.sizes,
            False,
            [0] * (weight.dim() - 2),
            ctx.groups,
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            made = torch.ops.aten.convolution_backward(grad, x, weight, *how, [True, False, False])
            grad_x = made[0].to(ctx.dtype)
        wanted = [False, True, ctx.bias is not None]
        make = partial(_convolution_grads, grad, x, weight, how, wanted)
        return grad_x, *_put_off(ctx, make), None, None, None, None


def _convolution_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: tuple[Any, ...], wanted: list[bool]
) -> Grads:
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(grad, x, weight, *how, wanted)
    return of_weight, of_bias


def _put_off(ctx: Any, make: Callable[[], Grads]) -> Grads:
    """What the backward says of weight and bias: nothing now, or their gradients where nobody collects."""
    if not ctx.later.open:
        return make()
    ctx.later.put((ctx.weight, ctx.bias), make)
    return None, None


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


def _as_with_gradients(
    stock: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    """What the function gives where gradients are on: torch chooses some kernels by that."""
    if weight.dim() == 2 and x.is_contiguous():  # (not the one of a product that needs no copy)
        return stock(x, weight, *others)
    with torch.enable_grad():
        return stock(x.detach(), weight.detach().requires_grad_(), *others).detach()


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
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


def _summed(grad: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of what was added to every row, in memory of its own."""
    if bias is None:
        return None
    summed = grad.sum_to_size(bias.shape)
    return summed.clone() if summed.data_ptr() == grad.data_ptr() else summed
