"""What a node is measured on: the batch's own numbers where they decide alone, small random ones else.

Whole numbers that other nodes compute (the experts that a router chose, say) must be indexes that exist: the
nodes that make them are run for that.
"""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch

from evenflow.cost.recorded import Recorded
from evenflow.graph.nouns.graph import Node
from evenflow.graph.nouns.template import Template
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.runtime.program.glue import Glue

# Large enough for no product of two to be subnormal, which processors are slow at.
SPREAD = 0.02

# Runs a node on these inputs, and returns what it makes.
Run = Callable[[Node, Mapping[int, torch.Tensor]], Mapping[int, torch.Tensor]]


def random_like(info: TensorInfo, device: torch.device) -> torch.Tensor:
    """A tensor of this form, with memory of its own: small random numbers, or zeros if they are whole.

    >>> random_like(TensorInfo((2, 3), (1, 2), torch.float32, True), torch.device("cpu")).stride()
    (1, 2)
    """
    strides = info.stride if len(info.stride) == len(info.shape) else torch.empty(info.shape).stride()
    length = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
    flat = torch.zeros(max(length, 0), dtype=info.dtype, device=device)
    if info.dtype.is_floating_point or info.dtype.is_complex:
        flat = torch.randn(flat.shape, device=device).mul_(SPREAD).to(info.dtype)
    return flat.as_strided(info.shape, strides)


class Inputs:
    """Makes the inputs of a graph's nodes, anew each time."""

    def __init__(self, recorded: Recorded, run: Run) -> None:
        self._recorded, self._graph, self._run = recorded, recorded.graph, run
        self._whole: dict[int, torch.Tensor] = {}  # whole numbers that nodes of the chain made

    def of(self, node: Node) -> dict[int, torch.Tensor]:
        """What the node is given, by value; parameters and buffers are in place already."""
        return {value: self._make(value) for value in self.values_of(node)}

    def values_of(self, node: Node) -> list[int]:
        """The values that a node must be given."""
        return [value for value in node.inputs if not self._graph.values[value].is_state]

    def from_batch(self, value: int) -> bool:
        """Whether the batch alone decides a value."""
        maker = self._graph.maker.get(value)
        return maker is None or maker.glue

    def _make(self, value: int) -> torch.Tensor:
        if self.from_batch(value):
            return self._glue[value].clone(memory_format=torch.preserve_format)
        info = self._graph.values[value].info
        if info.dtype.is_floating_point or info.dtype.is_complex:
            return random_like(info, self._recorded.device)
        if value not in self._whole:
            maker = self._graph.maker[value]
            made = self._run(maker, self.of(maker))
            self._whole |= {
                each: tensor for each, tensor in made.items() if not tensor.dtype.is_floating_point
            }
        return self._whole[value].clone()

    @cached_property
    def _glue(self) -> dict[int, torch.Tensor]:
        """All that nodes are given and the batch decides."""
        needed = {value for node in self._graph.nodes for value in self.values_of(node)}
        wanted = Template.of_values(sorted(value for value in needed if self.from_batch(value)))
        found = self._recorded
        return Glue(self._graph, found.model, wanted, found.device).values(found.batch)
