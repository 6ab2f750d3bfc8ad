"""Weight gradients put off: a backward in two parts, for the price of one.

`InputGrad` is one ordinary walk of autograd's graph. In it, a matrix product or a convolution computes the
gradient of its input alone, and puts aside what the gradient of its weight takes: its input and the gradient
of its result. `WeightGrad` computes those gradients and adds them to the parameters', as autograd would have.
Both make the kernel calls of torch's own formulas (`mm_mat1_backward`, `mm_mat2_backward`, and
`convolution_backward` of torch/csrc/autograd/FunctionsManual.cpp and derivatives.yaml), so every number has
the same bits. Nothing is computed twice, and what a forward has saved is let go of in the `InputGrad`, but
for what was put aside.

A weight may be a parameter or made of parameters alone (a view, a cast, a normalised weight): the rest of the
way is then walked in the `WeightGrad` too. What is no such product (a normalisation's scale, an embedding, a
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
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from evenflow.runtime.backward import Walk

# Where a gradient goes on in autograd's graph: to a parameter, or to what a weight was made of.
Target: TypeAlias = GradientEdge | None
Grads: TypeAlias = tuple[torch.Tensor | None, ...]
_MOST_STEPS = 64  # of the way from a weight to the parameters that it was made of


class WeightGrads:
    """What one microbatch of one stage has put aside.

    >>> later, weight = WeightGrads(), torch.nn.Parameter(torch.ones(1, 2))
    >>> later.put((get_gradient_edge(weight),), lambda: (torch.full((1, 2), 3.0),))
    >>> later.run()
    >>> weight.grad
    tensor([[3., 3.]])
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[tuple[Target, ...], Callable[[], Grads]]] = []

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def drop(self) -> None:
        """Let go of what was put aside."""
        self._jobs.clear()

    def put(self, targets: tuple[Target, ...], grads: Callable[[], Grads]) -> None:
        """Put a computation aside; `grads` gives a gradient for each target, or None where that is None."""
        self._jobs.append((targets, grads))

    def run(self) -> None:
        """Compute what was put aside, and let go of it.

        As in autograd's walk, the uses of one weight in a microbatch are summed in the order in which it came
        to them, and then added to what earlier microbatches left.
        """
        if not self._jobs:
            return
        uses = Counter(_key(target) for targets, _ in self._jobs for target in targets if target)
        sums: dict[object, torch.Tensor] = {}
        further = Walk([], [])
        self._jobs.reverse()
        with torch.no_grad():
            while self._jobs:
                targets, grads = self._jobs.pop()
                for target, grad in zip(targets, grads(), strict=True):
                    if target is None or grad is None:
                        continue
                    key = _key(target)
                    total = sums.pop(key) + grad if key in sums else grad
                    uses[key] -= 1
                    if uses[key]:
                        sums[key] = total
                    elif _is_leaf(target.node):
                        Walk([target], [total]).run()  # adds it up, with the parameter's hooks
                    else:
                        further.roots.append(target)
                        further.gradients.append(total)
        further.run()  # in one walk, as several may lead to one parameter


def _key(target: GradientEdge) -> object:
    return target.node, target.output_nr


def _is_leaf(node: Any) -> bool:  # a node of autograd's graph
    return bool(node.name() == "torch::autograd::AccumulateGrad")


class Deferral:
    """The parameters of a stage whose gradients are put off, and where those of the running forward go."""

    def __init__(self) -> None:
        self.into = WeightGrads()
        self._parameters: dict[int, torch.nn.Parameter] = {}  # by id
        self._refused: dict[int, torch.nn.Parameter] = {}
        self.anchor = torch.empty(0)  # (until it is known on which device)

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
        form = _FORMS.get(function)
        return None if form is None else partial(form, self, function)

    def takes(self, x: object, weight: object, bias: object = None) -> bool:
        """Whether the gradients of weight and bias are put off."""
        return (
            isinstance(x, torch.Tensor)
            and isinstance(weight, torch.Tensor)
            and weight.requires_grad
            and torch.is_grad_enabled()
            and x.layout is torch.strided
            and self._knows(weight)
            and (bias is None or (isinstance(bias, torch.Tensor) and self._knows(bias)))
        )

    def _knows(self, weight: torch.Tensor) -> bool:
        """Whether a weight is made of nothing but parameters that are put off."""
        if weight.grad_fn is None:
            return id(weight) in self._parameters
        waiting: list[Any] = [weight.grad_fn]
        for _ in range(_MOST_STEPS):
            node = waiting.pop()
            if _is_leaf(node):
                if id(node.variable) not in self._parameters:
                    return False
            else:
                waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
            if not waiting:
                return True
        return False


# -- a product in autograd's graph


class _Kind(NamedTuple):
    """How torch computes a product and its gradients; `more` are the function's own further arguments.

    `weight_grads` are those of weight and bias; it is told the bias's shape.
    """

    forward: Callable[..., torch.Tensor]  # of (stock, x, weight, bias, *more)
    input_grad: Callable[..., torch.Tensor]  # of (grad, x, weight, *more)
    weight_grads: Callable[..., Grads]  # of (grad, x, weight, shape or None, *more)
    is_cast: bool = True  # by autocast


class _Product(torch.autograd.Function):
    """A product whose backward computes the gradient of `x` and puts the rest aside.

    The graph ends in `anchor`, an empty leaf that gets no gradient, in the place of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004
        weights: tuple[torch.Tensor, torch.Tensor | None],
        rest: tuple[_Kind, Callable[..., torch.Tensor], WeightGrads, tuple[Any, ...]],
    ) -> torch.Tensor:
        ctx.kind, stock, ctx.later, ctx.more = rest
        weight, bias = weights
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
            return None, None, None, None
        # Without their graphs, which would hold what is put aside in a circle that nobody can break.
        x, weight, grad = (tensor.detach() for tensor in (*ctx.saved_tensors, grad))
        ctx.later.put(ctx.targets, partial(ctx.kind.weight_grads, grad, x, weight, ctx.bias_shape, *ctx.more))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return ctx.kind.input_grad(grad, x, weight, *ctx.more).to(ctx.dtype), None, None, None


def _put_off(
    deferral: Deferral,
    kind: _Kind,
    stock: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *more: Any,
) -> torch.Tensor:
    if deferral.anchor.device != x.device or not deferral.anchor.requires_grad:
        deferral.anchor = torch.empty(0, device=x.device, requires_grad=True)
    rest = (kind, stock, deferral.into, more)
    return _Product.apply(x, deferral.anchor, (weight, bias), rest)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves `apply` untyped


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


_LINEAR = _Kind(_linear_forward, _linear_input_grad, _linear_weight_grads)
_ADDMM = _Kind(_addmm_forward, _grad_of_left, _addmm_weight_grads)
_CONVOLUTION = _Kind(_with_gradients, _convolution_input_grad, _convolution_weight_grads)
_GROUPED = _Kind(_grouped_forward, _grouped_input_grad, _grouped_weight_grads, is_cast=False)


# -- torch's functions, with torch's own names of arguments, for those who call by name


def _linear(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if not deferral.takes(input, weight, bias):
        return stock(input, weight, bias)
    return _put_off(deferral, _LINEAR, stock, input, weight, bias)


def _addmm(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    **scales: Any,
) -> torch.Tensor:
    if scales or not deferral.takes(mat1, mat2, input):
        return stock(input, mat1, mat2, **scales)
    return _put_off(deferral, _ADDMM, stock, mat1, mat2, input)


def _convolution(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,  # (a number, or one for each dimension, as the next two)
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    sizes = stride, padding, dilation, groups
    is_padded, is_batch = isinstance(padding, str), input.dim() == weight.dim()
    if is_padded or not is_batch or not deferral.takes(input, weight, bias):
        return stock(input, weight, bias, *sizes)
    return _put_off(deferral, _CONVOLUTION, stock, input, weight, bias, *sizes)


def _grouped(
    deferral: Deferral,
    stock: Callable[..., torch.Tensor],
    self: torch.Tensor,
    mat2: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    if offs is None or others or not deferral.takes(self, mat2):
        return stock(self, mat2, offs=offs, **others)
    return _put_off(deferral, _GROUPED, stock, self, mat2, None, offs)


_Form = Callable[..., torch.Tensor]
_PLACES: tuple[tuple[Any, str, _Form], ...] = (
    (functional, "linear", _linear),
    (torch, "addmm", _addmm),
    (functional, "conv1d", _convolution),
    (functional, "conv2d", _convolution),
    (functional, "conv3d", _convolution),
    (torch, "_grouped_mm", _grouped),
)
_FORMS: Mapping[Callable[..., Any], _Form] = {
    getattr(module, name): form for module, name, form in _PLACES if hasattr(module, name)
}


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
        self._stock: list[tuple[Any, str, Callable[..., Any]]] = []

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                # It makes tables of torch's functions, and torch imports it whenever it comes to need it.
                importlib.import_module("torch._dynamo")
                there = [(module, name) for module, name, _ in _PLACES if hasattr(module, name)]
                found = [(module, name, getattr(module, name)) for module, name in there]
                self._stock = [each for each in found if each[-1] in _FORMS]
                for module, name, stock in self._stock:
                    setattr(module, name, update_wrapper(partial(_routed, _FORMS[stock], stock), stock))

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for module, name, stock in self._stock:
                    setattr(module, name, stock)


def _routed(form: _Form, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # as `stock`
    deferral = _LOCAL.deferral
    return stock(*args, **kwargs) if deferral is None else form(deferral, stock, *args, **kwargs)


_PATCH = _Patch()
