"""Where bad numbers began: the one of all that a step's watches noted from which the others follow.

Not every NaN matters: a mask is full of infinities, and `torch.where` may throw a NaN away. So the way is
walked back from the loss through what is bad, along NaNs where there are any, to nodes that made bad numbers
of good ones. Of these the first in program order is named; forward before backward, and the lowest
microbatch first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from evenflow.graph.nouns.graph import FunctionTarget, Graph, Node, Target
from evenflow.graph.nouns.tree import ParameterSource, Source
from evenflow.runtime.stages.finite import Count
from evenflow.runtime.stages.nan_watch import BadCall, BadGradient, begins, is_infinite, leaves_unset

GraphOf: TypeAlias = Callable[[int], Graph]  # the recording of a microbatch


@dataclass(frozen=True, slots=True)
class BadSum:
    """The gradient of a parameter, over all microbatches, that holds bad numbers; or, if none, is largest."""

    parameter: str
    count: Count

    @property
    def badness(self) -> tuple[bool, float]:
        """Orders sums: those that hold bad numbers last, and of the others the largest."""
        return self.count.num_bad > 0, self.count.largest


@dataclass(frozen=True, slots=True)
class Noted:
    """What one process noted of a step. `sums` are its parameters' gradients, the worst alone."""

    calls: Sequence[BadCall]
    gradients: Sequence[BadGradient]
    sums: Sequence[BadSum] = ()


@dataclass(frozen=True, slots=True)
class FromLeaf:
    """A node's bad numbers come from a parameter, a buffer or the batch."""

    call: BadCall
    source: Source
    count: Count


@dataclass(frozen=True, slots=True)
class FromCall:
    """A node made bad numbers of good ones: `made`, of all of its results that are bad together."""

    call: BadCall
    made: Count


@dataclass(frozen=True, slots=True)
class FromGradient:
    """A backward made bad gradients of finite ones; in the forward its node was bad too, or not."""

    gradient: BadGradient
    was_bad: bool


Origin: TypeAlias = FromLeaf | FromCall | FromGradient | BadSum


def first_bad(noted: Sequence[Noted], graph_of: GraphOf, *, loss: bool, anywhere: bool) -> Origin | None:
    """Where the bad numbers of a step began; None where nothing was noted that tells.

    `loss`: whether the step's loss is bad, which something in the forward is to blame for. `anywhere`:
    whether what nodes of a forward made counts where no loss came to be bad by it. What came in bad always
    does: a gradient may come to be bad by it alone.
    """
    calls = [call for each in noted for call in each.calls]
    numbers = sorted({call.place.microbatch for call in calls})
    forwards = [_Forward(graph_of(number), calls, number) for number in numbers]
    searches = [_Forward.behind_the_loss] * loss + [_Forward.first if anywhere else _Forward.first_leaf]
    for search in searches:
        for forward in forwards:
            found = search(forward)
            if found is not None:
                return found
    gradients = [gradient for each in noted for gradient in each.gradients]
    if gradients:
        # The backward comes to the last nodes first, and notes are in its order.
        first = min(gradients, key=lambda each: (each.place.microbatch, -each.place.node))
        same = (call.place for call in calls)
        was_bad = (first.place.microbatch, first.place.node) in ((p.microbatch, p.node) for p in same)
        return FromGradient(first, was_bad)
    sums = [each for noted_here in noted for each in noted_here.sums]
    return max(sums, key=lambda each: each.badness, default=None)


class _Forward:
    """One microbatch's forward: what its nodes made that is bad, on all stages."""

    def __init__(self, graph: Graph, calls: Iterable[BadCall], microbatch: int) -> None:
        self._graph = graph
        # By node: glue is called on several stages, others on tensor ranks, of which one may have the leaf.
        self._calls: dict[int, BadCall] = {}
        self._bad: dict[int, Count] = {}  # by value
        self._unset: set[int] = set()  # bad values of memory that nobody has written yet
        for call in calls:
            if call.place.microbatch == microbatch:
                known = self._calls.setdefault(call.place.node, call)
                if call.leaves and not known.leaves:
                    self._calls[call.place.node] = call
                self._bad.update(call.made)
        for node in self._nodes():
            if _is_unset(node.target) or not self._unset.isdisjoint(node.inputs):
                self._unset |= self._calls[node.index].made.keys()

    def behind_the_loss(self) -> Origin | None:
        """What the loss's bad numbers come from; None where it has none."""
        waiting = [value for value in self._graph.output.refs[:1] if value in self._bad]
        if not waiting:
            return None
        met: dict[int, Node] = {}
        while waiting:
            node = self._graph.maker.get(waiting.pop())
            if node is None or node.index in met:
                continue
            met[node.index] = node
            bad = [value for value in node.inputs if value in self._bad]
            with_nan = [value for value in bad if self._bad[value].num_nan]
            waiting += with_nan or bad
        nodes = [met[index] for index in sorted(met)]
        return _first(map(self._origin, nodes)) or self._of(nodes[0])

    def first(self) -> Origin | None:
        """The first node from which bad numbers come."""
        return _first(map(self._origin, self._nodes()))

    def first_leaf(self) -> Origin | None:
        """The first parameter, buffer or tensor of the batch that came in with bad numbers."""
        return _first(map(self._leaf, self._nodes()))

    def _nodes(self) -> Iterator[Node]:
        return (node for node in self._graph.nodes if node.index in self._calls)

    def _leaf(self, node: Node) -> Origin | None:
        call = self._calls[node.index]
        for source, count in call.leaves:
            if isinstance(source, ParameterSource) or not _is_mask(count):
                return FromLeaf(call, source, count)
        return None

    def _origin(self, node: Node) -> Origin | None:
        call, leaf = self._calls[node.index], self._leaf(node)
        if leaf is not None:
            return leaf
        if not self._unset.isdisjoint(call.made):
            return None
        taken = [self._bad[value] for value in node.inputs if value in self._bad]
        took = Count.together([*taken, *(count for _, count in call.leaves)])
        asked = any(map(is_infinite, node.args.leaves))
        made = Count.together(call.made.values())
        return self._of(node) if begins(made, took, infinite=asked) else None

    def _of(self, node: Node) -> Origin:
        call = self._calls[node.index]
        return FromCall(call, Count.together(call.made.values()))


def _is_unset(target: Target) -> bool:
    """Whether a node's results are memory that nobody has written."""
    return isinstance(target, FunctionTarget) and leaves_unset(target.function)


def _first(origins: Iterable[Origin | None]) -> Origin | None:
    return next((each for each in origins if each is not None), None)


def _is_mask(count: Count) -> bool:
    """Whether a tensor that was there before looks like a mask: negative infinities alone are meant."""
    return not count.num_nan and count.num_inf == count.num_negative
