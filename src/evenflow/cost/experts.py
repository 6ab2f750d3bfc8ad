"""Mixtures of experts in a recorded program: which parameters are experts', and what is handed to them.

Experts are found by what the program does, a grouped matrix product, or by their name, where each is a module
in a list called `experts`, as is the custom.
"""

import re
from collections.abc import Iterator

from evenflow.cost.functions import held_bytes
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.nouns.tree import ParameterSource

# torch's, and those that stand in for it in transformers.
_GROUPED = frozenset(("_grouped_mm", "grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback"))
_IN_A_LIST = re.compile(r"(?:^|.*\.)experts\.\d+\.")


class Experts:
    """The experts of a graph.

    - `parameters`: the names of those that belong to experts.
    - `handed_bytes`: of the activations that each node of the chain hands to experts in its forward, a copy
      for each expert that a token goes to. Where experts are modules that were not seen from inside, what
      the node takes counts once.
    """

    def __init__(self, graph: Graph) -> None:
        self._values = graph.values
        self._weights = {
            v.number: v.source.name for v in graph.values if isinstance(v.source, ParameterSource)
        }
        listed = {name for node in graph.chain for name in node.parameters if _IN_A_LIST.match(name)}
        self._owners: set[str] = set()  # modules with experts that have been handed theirs
        self.handed_bytes = tuple(
            sum(self._grouped(node)) or self._listed(node, listed) for node in graph.chain
        )
        grouped = {
            name
            for node in graph.chain
            for name in node.parameters
            if name.rpartition(".")[0] in self._owners
        }
        self.parameters = frozenset(grouped | listed)

    def _grouped(self, node: Node) -> Iterator[float]:
        """What each first grouped product of a module is given."""
        for step in node.steps:
            taken = [self._weights[number] for number in step.takes if number in self._weights]
            if len(taken) == len(step.takes) == 1:  # a weight's view, or its cast
                self._weights.update(dict.fromkeys(step.gives, taken[0]))
            if step.name in _GROUPED and taken:
                owner = taken[0].rpartition(".")[0]
                if owner not in self._owners:
                    self._owners.add(owner)
                    yield float(held_bytes(self._values[step.takes[0]].info))

    def _listed(self, node: Node, listed: set[str]) -> float:
        if listed.isdisjoint(node.parameters):
            return 0.0
        values = (self._values[number] for number in node.inputs)
        return float(sum(held_bytes(value.info) for value in values if value.info.requires_grad))
