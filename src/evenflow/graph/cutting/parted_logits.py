"""Logits that nobody needs whole: from a head that tensor ranks share straight into a cross-entropy.

Gathered, they are often the largest tensor of a step: rows x positions x the whole vocabulary, several times.
Where all that happens to them on their way are casts and new shapes, each rank can keep its own words' and
the loss be put together from those. Anything else, such as a program that returns logits, has them gathered.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

from torch.nn import functional as F

from evenflow.graph.kernels.settings import bare
from evenflow.graph.nouns.graph import FunctionTarget, Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import Ref

_KEEPS = frozenset(("float", "to", "type", "contiguous", "clone", "flatten", "bfloat16", "half"))
_RESHAPES = frozenset(("view", "reshape"))
_SIGNATURE = inspect.signature(F.cross_entropy)


@dataclass(frozen=True, slots=True)
class PartedLogits:
    """The nodes, by index: the head's call, those in between, the losses. `size` is the vocabulary's."""

    head: int
    between: tuple[int, ...]
    losses: tuple[int, ...]
    size: int

    @property
    def nodes(self) -> frozenset[int]:
        """All of them."""
        return frozenset((self.head, *self.between, *self.losses))


def parted_logits(graph: Graph, nodes: Sequence[Node], heads: Mapping[str, int]) -> list[PartedLogits]:
    """Those of one stage's `nodes` that keep a head's logits parted; `heads` maps their paths to their sizes.

    A head whose logits go anywhere else, to another stage say, is left out.
    """
    found = []
    for node in nodes:
        if isinstance(node.target, ModuleTarget) and node.target.path in heads:
            size = heads[node.target.path]
            walk = _Walk(graph, {each.index: each for each in nodes}, size)
            if walk.follow(node.results):
                found.append(PartedLogits(node.index, tuple(walk.between), tuple(walk.losses), size))
    return found


class _Walk:
    """Follows a head's logits through the program."""

    def __init__(self, graph: Graph, here: Mapping[int, Node], size: int) -> None:
        self.graph, self.here, self.size = graph, here, size
        self.between: list[int] = []
        self.losses: list[int] = []

    def follow(self, values: Iterable[int]) -> bool:
        """Whether all that is done with these values can be done in parts."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if value in self.graph.output.refs or self.graph.values[value].info.shape[-1:] != (self.size,):
                return False
            for node in self.graph.nodes:
                if value not in node.inputs:
                    continue
                if node.index not in self.here or node.rebinds:
                    return False
                if self._is_loss(node, value):
                    self.losses.append(node.index)
                elif self._is_between(node, value):
                    self.between.append(node.index)
                    waiting += node.results
                else:
                    return False
        return bool(self.losses)

    def _is_between(self, node: Node, value: int) -> bool:
        if (
            not isinstance(node.target, FunctionTarget)
            or node.args.refs != (value,)
            or len(node.results) != 1
        ):
            return False
        if reshapes(node):
            *before, last = [leaf for leaf in node.args.leaves if type(leaf) is int] or [0]
            return last == self.size or (last == -1 and self.size not in before)
        if node.function_name == "__getitem__":  # rows, or positions: never words
            return all(isinstance(leaf, Ref | slice | EllipsisType) for leaf in node.args.leaves)
        return node.function_name in _KEEPS

    def _is_loss(self, node: Node, value: int) -> bool:
        """Whether it is a plain cross-entropy of these logits, with numbers of classes for targets."""
        match node.target:
            case FunctionTarget(function) if bare(function) is F.cross_entropy:
                args, kwargs = node.args.unfilled()
                given = _SIGNATURE.bind(*args, **kwargs)
            case _:
                return False
        given.apply_defaults()
        plain = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}
        target = given.arguments["target"]
        return (
            given.arguments["input"] == Ref(value)
            and all(given.arguments[name] == expected for name, expected in plain.items())
            and isinstance(target, Ref)
            and target.value != value
            and len(self.graph.values[value].info.shape) == 2
            and not self.graph.values[target.value].info.dtype.is_floating_point
        )


def reshapes(node: Node) -> bool:
    """Whether it gives a tensor sizes that it is told."""
    return node.function_name in _RESHAPES
