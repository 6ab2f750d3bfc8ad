"""Which parameters' gradients can be put off: those of matrix products and convolutions."""

from collections.abc import Iterable, Sequence

from evenflow.graph.graph import Node
from evenflow.graph.tree import ParameterSource, Value

# Functions whose weight gradients the runtime can take later (`runtime.weight_grads`), and which of the
# tensors that they are handed are the inputs, whose gradients others wait for.
_INPUTS = {
    "linear": (0,),
    "conv1d": (0,),
    "conv2d": (0,),
    "conv3d": (0,),
    "addmm": (1,),
    "multi_head_attention_forward": (0,),  # its projections are calls of `linear`
}


def splittable(nodes: Iterable[Node], values: Sequence[Value]) -> tuple[set[str], set[str]]:
    """Return the parameters whose every use in these nodes is splittable, and all others that they use.

    One with another use gets that gradient with the input's, and has to get all of it then, lest its
    gradients add up in another order than in a whole backward.
    """
    found: set[str] = set()
    others: set[str] = set()
    for node in nodes:
        seen: set[str] = set()
        for step in () if node.opaque or node.hooks else node.steps:
            for place, number in enumerate(step.takes):
                source, info = values[number].source, values[number].info
                if not isinstance(source, ParameterSource):
                    continue
                seen.add(source.name)
                known = place not in _INPUTS.get(step.name, (place,)) and info.dtype.is_floating_point
                (found if known else others).add(source.name)
        others.update(set(node.parameters) - seen)  # used where nobody saw it
    return found - others, others
