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
uses or in none (`graph.cutting.weight_uses`), so that its gradients add up in the order of microbatches.

Rejected: to walk the graph twice, first to the inputs alone and then whole (that was here before): the walk
to the inputs was paid for twice. To compute all in the `InputGrad` and put the gradients aside: nothing of
the work would move, and each microbatch on its way would hold a copy of all gradients.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import GradientEdge

from evenflow.runtime.program.backward import Walk

# Where a gradient goes on in autograd's graph: to a parameter, or to what a weight was made of.
Target: TypeAlias = GradientEdge | None
Grads: TypeAlias = tuple[torch.Tensor | None, ...]


class WeightGrads:
    """What one microbatch of one stage has put aside.

    >>> from torch.autograd.graph import get_gradient_edge
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
                    elif is_leaf(target.node):
                        Walk([target], [total]).run()  # adds it up, with the parameter's hooks
                    else:
                        further.roots.append(target)
                        further.gradients.append(total)
        further.run()  # in one walk, as several may lead to one parameter


def _key(target: GradientEdge) -> object:
    return target.node, target.output_nr


def is_leaf(node: Any) -> bool:  # a node of autograd's graph
    """Whether a node adds gradients up in a parameter."""
    return bool(node.name() == "torch::autograd::AccumulateGrad")
