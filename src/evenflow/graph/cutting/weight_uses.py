"""Which parameters' gradients can be put off: those of matrix products and convolutions."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evenflow.graph.nouns.graph import FunctionTarget, Node, Step
from evenflow.graph.nouns.tree import ParameterSource, Value

# Functions whose weight gradients the runtime can take later (`runtime.program.weight_grads`), and the places
# of the inputs, whose gradients others wait for, among the tensors that they are handed.
_INPUTS = {
    "linear": (0,),
    "conv1d": (0,),
    "conv2d": (0,),
    "conv3d": (0,),
    "addmm": (1,),
    "_grouped_mm": (0,),
    "multi_head_attention_forward": (0,),  # its projections are calls of `linear`
}
_MOST_EARLIER = 16  # values that a weight was made of, one from the other

_Names = frozenset[str]


@dataclass(frozen=True, slots=True)
class _Product:
    """A use of weights: the node's index, the weights' numbers, and all parameters that they are made of."""

    node: int
    weights: tuple[int, ...]
    names: _Names


class WeightUses:
    """What some nodes use weights for. A weight is a parameter, or made of parameters alone.

    - `splittable`: the parameters whose every use is as a weight of a product; `others`: all others that the
      nodes use. One with another use gets that gradient with the input's, and has to get all of it then, lest
      its gradients add up in another order than in a whole backward. The same holds where a product's weight
      is what another's is made of; for a weight and a bias of one product, which are put off together; under
      autocast, where sums of several uses depend on what it keeps; and for several uses of a weight inside
      modules, which may call what cannot be seen from there.
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
        products: list[_Product] = []
        once = set[str]()  # parameters that may be used once alone
        for node in nodes:
            unseen = node.opaque or node.hooks or any(_is_apart(step) for step in node.steps)
            for step in node.steps if not unseen else ():
                made = self._product(node.index, step)
                if made is not None:
                    products.append(made)
                    if step.autocast or not isinstance(node.target, FunctionTarget):
                        once |= made.names
            seen = {n for step in node.steps for v in step.takes for n in self._made_of.get(v, ())}
            self.others.update(node.parameters if unseen else set(node.parameters) - seen)
        uses = Counter(name for product in products for name in product.names)
        self.others |= {name for name in once if uses[name] > 1}
        earlier = frozenset[int]().union(*(self._earlier[n] for each in products for n in each.weights))
        for product in products:
            if not earlier.isdisjoint(product.weights):
                self.others |= product.names
        before = -1
        while len(self.others) != before:
            before = len(self.others)
            for product in products:
                if not self.others.isdisjoint(product.names):
                    self.others |= product.names
        self.splittable = set(uses) - self.others
        self.nodes = {each.node for each in products if each.names <= self.splittable}
        self.weights = {number for number, names in self._made_of.items() if names <= self.splittable}

    def _product(self, node: int, step: Step) -> _Product | None:
        """The weights that a step multiplies by; notes what other things it does with weights."""
        weights = {number: self._made_of[number] for number in step.takes if number in self._made_of}
        if not weights or not step.grad_enabled:
            return None
        names = _Names().union(*weights.values())
        inputs = _INPUTS.get(step.name)
        if inputs is not None:
            own = tuple(number for place, number in enumerate(step.takes) if place not in inputs)
            own = tuple(number for number in own if number in weights)
            infos = [self._values[number].info for number in own]
            # A frozen weight's product is torch's own; of one under autocast that was made of others, or with
            # a parameter for input, the kept casts decide where sums are rounded.
            if (
                len(own) < len(weights)
                or not infos[0].requires_grad
                or any(len(self._earlier[number]) > _MOST_EARLIER for number in own)
                or not all(info.dtype.is_floating_point for info in infos)
                or (step.autocast and (step.name == "_grouped_mm" or any(map(self._earlier.get, own))))
            ):
                self.others |= names
                return None
            return _Product(node, own, names)
        alone = all(number in weights or not self._values[number].info.requires_grad for number in step.takes)
        if alone and not step.in_place:
            self._made_of.update(dict.fromkeys(step.gives, names))
            earlier = frozenset(weights).union(*(self._earlier[number] for number in weights))
            self._earlier.update(dict.fromkeys(step.gives, earlier))
        else:
            self.others |= names
        return None


def _is_apart(step: Step) -> bool:
    """Whether a step inside a node is walked, or computed again, at times of its own."""
    return step.walks or step.region is not None
