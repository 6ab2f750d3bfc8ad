"""How a recorded loss reduces: what its last operations are means or sums of.

A step's loss must be the unsplit loss over the whole batch, so each microbatch counts as much as its loss is
a mean over: rows, numbers, or the targets that cross-entropy does not ignore. The labels alone don't tell
(language models shift them by one, so that a row's first label never counts); the recording does. The loss
is followed backwards through sums, scalings and casts to the functions that reduced.

Only what is certain is said: a plain `.sum()` may well be the sum of numbers that were normalised before.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

from evenflow.graph.kernels.settings import bare
from evenflow.graph.nouns.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import Ref
from evenflow.graph.nouns.tree import BatchLeaf, BufferSource


@dataclass(frozen=True, slots=True)
class Targets:
    """A mean over the targets that are not `ignore_index`, each with its class's weight, if there are any."""

    target: int  # value: depends on the batch alone
    ignore_index: int
    class_weights: str | None  # name of a buffer


@dataclass(frozen=True, slots=True)
class Quotient:
    """A sum divided by this value, a number that is computed from the batch's rows (`mask.sum()`)."""

    divisor: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """A mean over so many numbers."""

    count: int


@dataclass(frozen=True, slots=True)
class Total:
    """A sum, perhaps divided by a number that is the same for all microbatches."""


@dataclass(frozen=True, slots=True)
class Summed:
    """Numbers that were added up, and perhaps normalised before: a sum or a mean."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Something added to the rest of the loss, of which nothing can be told."""


Reduction: TypeAlias = Targets | Quotient | Numbers | Total | Summed | Unread

_CLASSIFYING = {F.cross_entropy: torch.nn.CrossEntropyLoss, F.nll_loss: torch.nn.NLLLoss}
_ELEMENTWISE = {
    F.mse_loss: torch.nn.MSELoss,
    F.l1_loss: torch.nn.L1Loss,
    F.smooth_l1_loss: torch.nn.SmoothL1Loss,
    F.huber_loss: torch.nn.HuberLoss,
    F.binary_cross_entropy: torch.nn.BCELoss,
    F.binary_cross_entropy_with_logits: torch.nn.BCEWithLogitsLoss,
}
_SAME = {
    "float",
    "double",
    "half",
    "bfloat16",
    "to",
    "type",
    "clone",
    "contiguous",
    "squeeze",
    "view",
    "reshape",
}
_ADD = {"add", "add_", "sub", "sub_", "__radd__", "__iadd__", "__rsub__", "__isub__", "rsub", "neg"}
_DIVIDE = {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"}
_MULTIPLY = {"mul", "mul_", "multiply", "__rmul__", "__imul__"}


def read_reduction(
    graph: Graph, model: torch.nn.Module, *, rows: int | None, given_count: int | None = None
) -> tuple[Reduction, ...]:
    """What the loss's terms are means or sums of; nothing where not even its terms can be told.

    `rows` is the length of dim 0 of the recorded microbatch; `given_count` says which of its tensors is the
    number of items in the whole batch, if one is.
    """
    loss = graph.output.leaves[0]
    reader = _Reader(graph, model, rows, given_count)
    return tuple(dict.fromkeys(reader.terms(loss.value))) if isinstance(loss, Ref) else ()


@dataclass(frozen=True, slots=True)
class _Reader:
    graph: Graph
    model: torch.nn.Module
    rows: int | None
    given_count: int | None

    def terms(self, value: int) -> Iterator[Reduction]:
        node = self.graph.maker.get(value)
        if node is None or math.prod(self.shape(value)) != 1:
            return
        found = self.classifying(node) or self.elementwise(node)
        if found is not None:
            yield found
            return
        name = node.function_name
        refs = [leaf.value for leaf in node.args.leaves if isinstance(leaf, Ref)]
        if name in _ADD:
            for ref in refs:
                yield from list(self.terms(ref)) or (Unread(),)
        elif name in _DIVIDE:
            arguments, _ = node.args.unfilled()
            if len(arguments) == 2:
                yield from self.divided(*arguments)
        elif name in _MULTIPLY:
            yield from self.scaled(refs)
        elif name in {"mean", "sum"} and refs:
            yield from self.reduced(name, refs[0])
        elif name in _SAME and len(refs) == 1:
            yield from self.terms(refs[0])

    def classifying(self, node: Node) -> Reduction | None:
        for function, kind in _CLASSIFYING.items():
            given = self.arguments(node, function, kind)
            if given is None:
                continue
            target, weights = given["target"], given.get("weight")
            if given["reduction"] == "sum":
                return Total()
            if given["reduction"] != "mean" or not isinstance(target, Ref) or not self.is_glue(target.value):
                return None
            if self.graph.values[
                target.value
            ].info.dtype.is_floating_point:  # probabilities: a mean over rows
                shape = self.shape(target.value)
                return self.numbers(target.value, width=shape[1] if len(shape) > 1 else shape[0])
            name = self.buffer_name(weights)
            return (
                None
                if weights is not None and name is None
                else Targets(target.value, given["ignore_index"], name)
            )
        return None

    def elementwise(self, node: Node) -> Reduction | None:
        for function, kind in _ELEMENTWISE.items():
            given = self.arguments(node, function, kind)
            if given is not None and given.get("weight") is None and isinstance(given["input"], Ref):
                if given["reduction"] == "sum":
                    return Total()
                return self.numbers(given["input"].value) if given["reduction"] == "mean" else None
        return None

    def arguments(
        self, node: Node, function: Any, kind: type[torch.nn.Module]
    ) -> Mapping[str, Any] | None:  # of torch's functions, of any type
        """The arguments by name where the node calls this loss function, or a module that does."""
        args, kwargs = node.args.unfilled()
        signature = inspect.signature(function)
        match node.target:
            case FunctionTarget(called) if bare(called) is function:
                bound = signature.bind(*args, **kwargs)
            case ModuleTarget(path) if type(module := self.model.get_submodule(path)) is kind:
                known = {
                    name: getattr(module, name) for name in signature.parameters if hasattr(module, name)
                }
                bound = signature.bind(*args, **kwargs, **known)
            case _:
                return None
        bound.apply_defaults()
        outdated = any(bound.arguments.get(name) is not None for name in ("size_average", "reduce"))
        return None if outdated else bound.arguments

    def divided(self, above: Any, below: Any) -> Iterator[Reduction]:  # arguments of any kind
        if not isinstance(above, Ref):
            return
        terms = list(self.terms(above.value))
        summed = terms in ([Total()], [Summed()])
        if not isinstance(below, Ref):
            if not summed:
                yield from terms
            elif self.rows and below and below % self.rows == 0:
                yield Numbers(int(below))  # `/ len(x)`: the length is a plain number of the recording
        elif not self.is_glue(below.value) or math.prod(self.shape(below.value)) != 1:
            return
        elif self.depends_on_rows(below.value):
            if summed:
                yield Quotient(below.value)
        elif summed and self.is_given_count(below.value):
            yield Total()
        else:
            yield from terms

    def scaled(self, refs: list[int]) -> Iterator[Reduction]:
        """A product with plain numbers, or with one that is the same for all microbatches."""
        unknown = [ref for ref in refs if not self.is_glue(ref) or self.depends_on_rows(ref)]
        if len(unknown) == 1:
            yield from (Summed() if term == Total() else term for term in self.terms(unknown[0]))

    def reduced(self, name: str, operand: int) -> Iterator[Reduction]:
        """All numbers of a tensor were averaged or added up."""
        if math.prod(self.shape(operand)) == 1 and not self.shape(operand):
            yield from self.terms(operand)
            return
        maker = self.graph.maker.get(operand)
        if maker is not None and maker.function_name == "stack":
            for ref in maker.args.refs:
                yield from self.terms(ref)
        elif name == "sum":
            yield Summed()
        elif (found := self.numbers(operand)) is not None:
            yield found

    def numbers(self, value: int, *, width: int = 1) -> Numbers | None:
        shape = self.shape(value)
        of_rows = self.rows and shape and shape[0] % self.rows == 0
        return Numbers(math.prod(shape) // width) if of_rows else None

    def is_given_count(self, value: int) -> bool:
        return any(leaf.index == self.given_count for leaf in self.leaves(value))

    def is_glue(self, value: int) -> bool:
        maker = self.graph.maker.get(value)
        if maker is None:
            return isinstance(self.graph.values[value].source, BatchLeaf)
        return maker.glue

    def depends_on_rows(self, value: int) -> bool:
        return any(leaf.shape for leaf in self.leaves(value))

    def leaves(self, value: int) -> "Iterator[_Leaf]":
        """The tensors of the microbatch that a value was computed from."""
        wanted, seen = [value], set()
        while wanted:
            current = wanted.pop()
            if current in seen:
                continue
            seen.add(current)
            maker, known = self.graph.maker.get(current), self.graph.values[current]
            if maker is not None:
                wanted.extend(maker.inputs)
            elif isinstance(known.source, BatchLeaf):
                yield _Leaf(known.source.index, known.info.shape)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].info.shape

    def buffer_name(self, weights: Any) -> str | None:  # an argument of any kind
        if isinstance(weights, torch.Tensor):  # a module's own
            return next((name for name, buffer in self.model.named_buffers() if buffer is weights), None)
        source = self.graph.values[weights.value].source if isinstance(weights, Ref) else None
        return source.name if isinstance(source, BufferSource) else None


@dataclass(frozen=True, slots=True)
class _Leaf:
    index: int
    shape: tuple[int, ...]
