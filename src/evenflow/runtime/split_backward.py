"""A backward in two parts: `InputGrad` walks the graph to what was received, `WeightGrad` to all the rest.

`InputGrad` runs autograd's walk from the same roots and gradients as a whole backward, but only along the
paths that end in a received value, and keeps the graph. `WeightGrad` is the whole walk, whose gradients for
other stages nobody needs any more. So the gradients of the weights come from the very call that a whole
backward makes. Those of the inputs have the same bits, because autograd runs nodes from the last made to the
first and adds up in that order, and a node that leads to a received value has all its successors on such
paths too: what is left out adds nothing. The price is that the walk along these paths is taken twice, and
that everything which forward saved is held until the `WeightGrad`.

Rejected: to compute all in `InputGrad` and to put the gradients of the weights aside. Nothing of the work
would move, and each microbatch on its way would hold a copy of all gradients.

A graph may forbid a second walk. It is then walked once, whole, in the `InputGrad`, which leaves nothing for
the `WeightGrad`. That is so where the graph holds

- a Python function (a custom `autograd.Function`, reentrant checkpointing, hooks of modules on their
  backward, compiled regions): what it does in its backward is its own, and it may give up what it saved;
- a tensor saved through hooks (non-reentrant checkpointing): unpacking may run a module's forward again;
- hooks on tensors, which the recorder saw: they would be called twice.

So it is, too, where no weight is reached. And where nothing received is reached (on the first stage) all is
left to the `WeightGrad`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from evenflow.runtime.backward import is_boundary


@dataclass(frozen=True, slots=True)
class Walk:
    """A backward that is ready to be run: where it starts, and with which gradients."""

    roots: Sequence[GradientEdge]
    gradients: Sequence[torch.Tensor]

    def run(self) -> None:
        """Walk the whole graph, which ends its life."""
        if self.roots:
            torch.autograd.backward(self.roots, self.gradients)

    def run_to(self, leaves: Sequence[torch.Tensor]) -> None:
        """Walk to these leaves alone, and keep the graph."""
        torch.autograd.backward(self.roots, self.gradients, inputs=leaves, retain_graph=True)


@dataclass(frozen=True, slots=True)
class Extent:
    """What a walk reaches, and whether it may be taken twice."""

    received: bool  # a value that came from another stage
    weights: bool  # any other leaf: parameters, as a rule
    twice: bool


def extent(walk: Walk) -> Extent:
    """Look through the graph of a walk. Takes about 3 µs a node.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> extent(Walk([torch.autograd.graph.get_gradient_edge((weight * 2).sum())], [torch.ones(())]))
    Extent(received=False, weights=True, twice=True)
    """
    waiting: list[Any] = [root.node for root in walk.roots]
    received, weights, twice = False, False, True
    seen: set[Any] = {None}  # nodes of autograd's graph
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        if is_boundary(node):
            received = True
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            weights = True
            continue
        twice = twice and not _is_python(node) and not _saves_through_hooks(node)
        waiting += [earlier for earlier, _ in node.next_functions]
    return Extent(received, weights, twice)


def _is_python(node: Any) -> bool:  # (a node of autograd's graph, as below)
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _saves_through_hooks(node: Any) -> bool:
    for name in _saved_by(type(node)):  # type: ignore[arg-type]  # mypy takes a class for unhashable
        saved = getattr(node, name)
        if any(one.unpack_hook is not None for one in (saved if isinstance(saved, tuple) else (saved,))):
            return True
    return False


@cache
def _saved_by(kind: type[Any]) -> tuple[str, ...]:
    """The attributes in which a kind of autograd's nodes keeps its saved tensors, unopened."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
