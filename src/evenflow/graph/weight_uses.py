"""Which parameters' gradients can be put off: those of matrix products and convolutions."""

from collections.abc import Iterable, Sequence

from evenflow.graph.graph import Node, Step
from evenflow.graph.tree import ParameterSource, Value

# Functions whose weight gradients the runtime can take later (`runtime.weight_grads`), and which of the
# tensors that they are handed are the inputs, whose gradients others wait for.
_INPUTS = {
    "linear": (0,),
    "conv1d": (0,),
    "conv2d": (0,),
    "conv3d": (0,),
    "addmm": (1,),
    "_grouped_mm": (0,),
    "multi_head_attention_forward": (0,),  # its projections are calls of `linear`
}
_WALKS = frozenset(("grad", "backward"))  # a node in which autograd walks is not looked into


class WeightUses:
    """What some nodes use weights for. A weight is a parameter, or made of parameters alone.

    - `splittable`: the parameters whose every use is as a weight of a product; `others`: all others that the
      nodes use. One with another use gets that gradient with the input's, and has to get all of it then, lest
      its gradients add up in another order than in a whole backward.
      The same holds where a product's weight is what another product's weight is made of.
    - `nodes`: the indexes of nodes in which there is such a product.
    - `weights`: the numbers of values that are weights of splittable parameters.
    """

    def __init__(self, nodes: Iterable[Node], values: Sequence[Value]) -> None:
        self._values = values
        self._made_of = {
            value.number: frozenset([value.source.name])
            for value in values
            if isinstance(value.source, ParameterSource)
        }
        self._earlier = dict.fromkeys(self._made_of, frozenset[int]())  # what a weight was made of, by number
        self.others = set[str]()
        products: list[tuple[int, int]] = []  # index of the node, number of the weight
        for node in nodes:
            unseen = node.opaque or node.hooks or any(step.name in _WALKS for step in node.steps)
            for step in node.steps if not unseen else ():
                products += [(node.index, number) for number in self._in_product(step)]
            seen = {n for step in node.steps for v in step.takes for n in self._made_of.get(v, ())}
            self.others.update(node.parameters if unseen else set(node.parameters) - seen)
        earlier = frozenset[int]().union(*(self._earlier[number] for _, number in products))
        self.others.update(*(self._made_of[number] for _, number in products if number in earlier))
        self.splittable = set[str]().union(*(self._made_of[number] for _, number in products)) - self.others
        self.nodes = {index for index, number in products if self._made_of[number] <= self.splittable}
        self.weights = {number for number, names in self._made_of.items() if names <= self.splittable}

    def _in_product(self, step: Step) -> Iterable[int]:
        """The weights that a step multiplies by; notes what other things it does with weights."""
        weights = {number: self._made_of[number] for number in step.takes if number in self._made_of}
        if not weights or not step.grad_enabled:
            return
        inputs = _INPUTS.get(step.name)
        if inputs is not None:
            for place, number in enumerate(step.takes):
                names = weights.get(number, frozenset())
                if place in inputs or not self._values[number].info.dtype.is_floating_point:
                    self.others |= names
                elif names:
                    yield number
            return
        names = frozenset().union(*weights.values())
        alone = all(number in weights or not self._values[number].info.requires_grad for number in step.takes)
        if alone and not step.in_place:
            self._made_of.update(dict.fromkeys(step.gives, names))
            earlier = frozenset(weights).union(*(self._earlier[number] for number in weights))
            self._earlier.update(dict.fromkeys(step.gives, earlier))
        else:
            self.others |= names
