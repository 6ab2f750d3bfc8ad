"""Torch functions as an estimate sees them: what each computes, moves, and keeps for its backward.

What autograd keeps is known for each kind of function; of one that is not named here all that it took. That
is as on a GPU: on a CPU a dropout's mask has the numbers' own type, and attention with dropout
keeps its scores.
Memory is counted by storages, so that what several functions keep is held once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from evenflow.graph.cutting.weight_uses import WeightUses
from evenflow.graph.nouns.graph import Graph, Step
from evenflow.graph.nouns.tree import BatchLeaf, ParameterSource, TensorInfo

_KEEPS_NOTHING = frozenset(
    (
        *("add", "radd", "iadd", "sub", "rsub", "isub", "neg", "sum", "mean", "cumsum", "nll_loss"),
        *("to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "copy"),
        *("cat", "stack", "pad", "roll", "repeat", "repeat_interleave", "flatten", "reshape", "expand"),
        *("squeeze", "unsqueeze", "interpolate", "where", "masked_fill", "getitem", "embedding"),
        *("gather", "index_select", "index_add", "scatter_add"),
        *("dropout", "cross_entropy"),  # they keep what they make inside
    )
)
_KEEPS_RESULT = frozenset(("softmax", "log_softmax", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "relu"))
_GATHERS = frozenset(("embedding", "gather", "index_select", "getitem", "take_along_dim"))
_PRODUCTS = frozenset(("mul", "rmul", "imul", "div", "truediv", "rtruediv"))
_ATTENTION = "scaled_dot_product_attention"
# FlashAttention-2 (Dao, 2023), section 4: five products in the backward for two in the forward, as the
# scores are computed again.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Pass:
    """Operations of matrix products in a dtype, bytes read and written, and kernels."""

    flops: float
    num_bytes: float
    num_kernels: int
    dtype: str


@dataclass(frozen=True, slots=True)
class FunctionCost:
    """What one call of a function costs: its three passes, and what it leaves in memory.

    - `saved`: the storages of values that the backward needs; `saved_bytes`: what it needs besides.
    - `kept` and `kept_bytes`: what the weight gradient alone needs, of these and of gradients.
    - `forward_bytes`, `backward_bytes`: what is allocated while it runs, saved or not.
    """

    forward: Pass
    input_grad: Pass
    weight_grad: Pass
    saved: frozenset[int] = frozenset()
    saved_bytes: float = 0.0
    kept: frozenset[int] = frozenset()
    kept_bytes: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


class FunctionCosts:
    """Asks of each step of a graph, in program order, what it costs."""

    def __init__(self, graph: Graph) -> None:
        self._values = graph.values
        self._weights = {v.number for v in graph.values if isinstance(v.source, ParameterSource)}
        self._put_off = WeightUses(graph.chain, graph.values).weights
        self._given = {v.storage for v in graph.values if v.is_state or isinstance(v.source, BatchLeaf)}
        self._used: set[int] = set()
        self.bytes_of: dict[int, int] = {}  # of each storage
        for value in graph.values:
            self.bytes_of[value.storage] = max(self.bytes_of.get(value.storage, 0), held_bytes(value.info))

    def of(self, step: Step, *, unseen_weights: bool = False) -> FunctionCost:
        """What the step costs. Steps must be asked for in the order in which they ran.

        `unseen_weights`: it is a whole module whose inside was not seen, with weights to train.
        """
        takes = [number for number in step.takes if number not in step.gives or step.in_place]
        if takes and self._weights.issuperset(takes):
            self._weights.update(step.gives)  # a weight's view, its cast, or the sum of two
        kind = step.name.strip("_")
        dtype = self._dtype(step)
        is_view = not step.in_place and {self._storage(n) for n in step.gives} <= {
            self._storage(n) for n in takes
        }
        nothing = Pass(0.0, 0.0, 0, dtype)
        if is_view and not step.flops:
            return FunctionCost(nothing, nothing, nothing)
        differentiable = step.grad_enabled and any(self._requires_grad(n) for n in step.gives)
        inside = self._inside(kind, step) if differentiable else 0.0
        moved = self._bytes(step.gives) + inside
        moved += self._bytes(step.gives) if kind in _GATHERS else self._bytes(takes)
        forward = Pass(step.flops, moved, 1, dtype)
        made = sum(self.bytes_of[s] for s in self._new_storages(step)) + inside
        if not differentiable:
            return FunctionCost(forward, nothing, nothing, forward_bytes=made)
        saved = self._saved(kind, step) - self._given
        received = [n for n in takes if self._requires_grad(n) and n not in self._weights]
        weights = [n for n in takes if self._requires_grad(n) and n in self._weights]
        input_grad, weight_grad = self._backward(kind, forward, received, weights)
        if unseen_weights:
            weight_grad = _times(forward, 1, 0.0)
        is_put_off = bool(weights) and self._put_off.issuperset(weights)
        if not is_put_off:  # all of it comes with the input's gradient
            input_grad, weight_grad = _sum(input_grad, weight_grad), _times(weight_grad, 0, 0.0)
        return FunctionCost(
            forward,
            input_grad,
            weight_grad,
            saved=saved,
            saved_bytes=inside,
            kept=saved if is_put_off else frozenset(),
            kept_bytes=self._bytes(step.gives) if is_put_off else 0.0,
            forward_bytes=made,
            backward_bytes=self._bytes((*step.gives, *received, *weights)),
        )

    def _backward(
        self, kind: str, forward: Pass, received: list[int], weights: list[int]
    ) -> tuple[Pass, Pass]:
        # A value that is used again gets the sum of two gradients; a weight's is added to those before.
        sums = 3.0 * self._bytes(n for n in received if n in self._used)
        added = 3.0 * self._bytes(weights)
        self._used.update(received)
        if kind == _ATTENTION:
            factor = _ATTENTION_BACKWARD if received else 0.0
            flops, moved = factor * forward.flops, factor * forward.num_bytes
            num_kernels = 1 if received else 0
            return Pass(flops, moved + sums, num_kernels, forward.dtype), Pass(0.0, added, 0, forward.dtype)
        if forward.flops:
            matrices = [n for n in weights if len(self._values[n].info.shape) > 1]
            return (
                _times(forward, len(received), sums),
                _times(forward, len(matrices), added),
            )
        if kind in _GATHERS:  # all of the table's gradient is written, most of it zeros
            sums += self._bytes(received)
            added += self._bytes(weights)
        moved = forward.num_bytes + sums
        both = Pass(0.0, moved, 1 if received else 0, forward.dtype)
        nothing = Pass(0.0, added, 0, forward.dtype)
        return (both, nothing) if received else (nothing, Pass(0.0, moved + added, 1, forward.dtype))

    def _saved(self, kind: str, step: Step) -> frozenset[int]:
        floats = [n for n in step.takes if self._values[n].info.dtype.is_floating_point]
        saved = [n for n in step.takes if n not in floats]  # indexes and masks
        if (step.flops and kind != _ATTENTION) or kind in _PRODUCTS:
            saved += [
                n
                for n in floats
                if any(self._requires_grad(other) for other in floats if other != n)
                or (floats.count(n) == len(floats) and self._requires_grad(n))
            ]
        elif kind in _KEEPS_RESULT:
            saved += step.gives
        elif kind == _ATTENTION:
            saved += (*floats, *step.gives)
        elif kind not in _KEEPS_NOTHING:
            saved += floats
        return frozenset(self._storage(n) for n in saved)

    def _inside(self, kind: str, step: Step) -> float:
        """Bytes that the function makes for its backward and gives to nobody."""
        first = self._values[step.takes[0]].info if step.takes else None
        if first is None:
            return 0.0
        match kind:
            case "cross_entropy":  # the logarithms of the probabilities
                return held_bytes(first)
            case "dropout":  # a mask of a byte for each element
                return math.prod(first.shape)
            case _ if kind == _ATTENTION:  # the logarithm of each row's sum, in float32
                return 4.0 * math.prod(first.shape[:-1])
        return 0.0

    def _dtype(self, step: Step) -> str:
        gives = [self._values[n].info.dtype for n in step.gives]
        return str(gives[0]).removeprefix("torch.") if gives else ""

    def _requires_grad(self, number: int) -> bool:
        return self._values[number].info.requires_grad

    def _storage(self, number: int) -> int:
        return self._values[number].storage

    def _new_storages(self, step: Step) -> set[int]:
        return {self._storage(n) for n in step.gives} - {self._storage(n) for n in step.takes}

    def _bytes(self, numbers: Iterable[int]) -> float:
        return float(sum(held_bytes(self._values[n].info) for n in numbers))


def held_bytes(info: TensorInfo) -> int:
    """Bytes of memory behind a tensor's elements; those that an expanded tensor repeats are there once.

    >>> import torch
    >>> held_bytes(TensorInfo((4, 8), (0, 1), torch.float32, requires_grad=False))
    32
    """
    pairs = zip(info.shape, info.stride, strict=True)
    return math.prod(size for size, stride in pairs if stride) * int(info.dtype.itemsize)


def _sum(one: Pass, other: Pass) -> Pass:
    return Pass(
        one.flops + other.flops,
        one.num_bytes + other.num_bytes,
        one.num_kernels + other.num_kernels,
        one.dtype,
    )


def _times(work: Pass, number: int, more_bytes: float) -> Pass:
    return Pass(
        work.flops * number, work.num_bytes * number + more_bytes, work.num_kernels * number, work.dtype
    )
