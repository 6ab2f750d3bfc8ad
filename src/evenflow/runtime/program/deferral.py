"""Deferral: which weights of a stage have their gradients put off, in whatever code calls torch's functions.

A node that is such a function is called in another form; inside a module that stays whole torch's functions
are replaced for its call.
"""

import importlib
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial, update_wrapper
from typing import Any

import torch
from torch.nn import functional

from evenflow.runtime.program.products import ADDMM, CONVOLUTION, GROUPED, LINEAR, Product, put_off
from evenflow.runtime.program.weight_grads import WeightGrads, is_leaf

_MOST_STEPS = 64  # of the way from a weight to the parameters that it was made of


class Deferral:
    """The parameters of a stage whose gradients are put off, and where those of the running forward go.

    `device` is the stage's.
    """

    def __init__(self, device: torch.device) -> None:
        self.into = WeightGrads()
        self._parameters: dict[int, torch.nn.Parameter] = {}  # by id
        self._refused: dict[int, torch.nn.Parameter] = {}
        self._anchor = torch.empty(0, device=device, requires_grad=True)  # where graphs end

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
        read = _READS.get(function)
        return None if read is None else partial(self.call, read, function)

    def _takes(self, product: Product) -> bool:
        """Whether the gradients of weight and bias are put off."""
        x, weight, bias = product.x, product.weight, product.bias
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
            if is_leaf(node):
                if id(node.variable) not in self._parameters:
                    return False
            else:
                waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
            if not waiting:
                return True
        return False

    def call(self, read: "_Read", stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # as `stock`
        """What one of torch's functions makes of these arguments; its weight's gradients put off if so."""
        found = read(*args, **kwargs)
        if found is None or not self._takes(found):
            return stock(*args, **kwargs)
        return put_off(self.into, self._anchor, stock, found)


# -- how torch's functions read their arguments, under torch's own names, for those who call by name; None for
# calls of which nothing is put off


def _linear(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Product | None:
    return Product(LINEAR, input, weight, bias)


def _addmm(
    input: torch.Tensor,  # noqa: A002
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    **scales: Any,
) -> Product | None:
    return None if scales else Product(ADDMM, mat1, mat2, input)


def _convolution(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,  # (a number, or one for each dimension, as the next two)
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product | None:
    if isinstance(padding, str) or input.dim() != weight.dim():  # a single picture has no rows
        return None
    return Product(CONVOLUTION, input, weight, bias, (stride, padding, dilation, groups))


def _grouped(
    self: torch.Tensor, mat2: torch.Tensor, *, offs: torch.Tensor | None = None, **others: Any
) -> Product | None:
    return None if offs is None or others else Product(GROUPED, self, mat2, None, (offs,))


_Read = Callable[..., Product | None]
_PLACES: tuple[tuple[Any, str, _Read], ...] = (
    (functional, "linear", _linear),
    (torch, "addmm", _addmm),
    (functional, "conv1d", _convolution),
    (functional, "conv2d", _convolution),
    (functional, "conv3d", _convolution),
    (torch, "_grouped_mm", _grouped),
)
_STOCK = tuple(
    (module, name, getattr(module, name), read) for module, name, read in _PLACES if hasattr(module, name)
)
_READS: Mapping[Callable[..., Any], _Read] = {stock: read for _, _, stock, read in _STOCK}


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
        self._replaced: list[tuple[Any, str, Callable[..., Any]]] = []

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                # Those that somebody else has replaced are left alone.
                ours = [each for each in _routes() if getattr(each[0], each[1]) is each[2]]
                self._replaced = [(module, name, stock) for module, name, stock, _ in ours]
                for module, name, _, route in ours:
                    setattr(module, name, route)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for module, name, stock in self._replaced:
                    setattr(module, name, stock)


@cache
def _routes() -> list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]]:
    """Where each function stands, itself, and what takes its place."""
    # It makes tables of torch's functions, and torch imports it whenever it comes to need it.
    importlib.import_module("torch._dynamo")
    return [
        (module, name, stock, update_wrapper(partial(_routed, read, stock), stock))
        for module, name, stock, read in _STOCK
    ]


def _routed(read: _Read, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # as `stock`
    deferral = _LOCAL.deferral
    return stock(*args, **kwargs) if deferral is None else deferral.call(read, stock, *args, **kwargs)


_PATCH = _Patch()
