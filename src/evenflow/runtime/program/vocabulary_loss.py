"""A cross-entropy of logits of which each tensor rank has its own words', and the head that makes them.

Each rank takes the largest of its logits, the sum of their exponentials, and the target's logit where that is
among its own; ranks add up three numbers for each row, and none ever has all logits of one.
Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from evenflow.graph.cutting.parted_logits import parted_logits, reshapes
from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.graph.nouns.graph import Graph, ModuleTarget, Node
from evenflow.graph.nouns.template import Template
from evenflow.runtime.program.call import StandIn, StandIns
from evenflow.runtime.ranks.world import World


class Vocabulary:
    """The heads that tensor ranks share; `heads` maps a module's path to the size of its vocabulary."""

    def __init__(self, world: World, heads: Mapping[str, int]) -> None:
        self._world, self._heads = world, heads

    def stand_ins(self, graph: Graph, nodes: Sequence[Node], model: torch.nn.Module) -> StandIns:
        """What takes the place of nodes on this rank."""
        found: dict[int, StandIn] = {}
        by_index = {node.index: node for node in nodes}
        for logits in parted_logits(graph, nodes, self._heads):
            head = by_index[logits.head]
            assert isinstance(head.target, ModuleTarget), "a head is a module"
            found[head.index] = partial(_parted, model.get_submodule(head.target.path)), head.args
            own = logits.size // self._world.size
            for index in logits.between:
                found[index] = None, _resized(by_index[index], logits.size, own)
            loss = partial(cross_entropy, self._world)
            found |= {index: (loss, by_index[index].args) for index in logits.losses}
        return found


def _resized(node: Node, size: int, own: int) -> Template:
    """The node's arguments on this rank: the last size of a new shape is that of its own words."""
    args = node.args
    if not reshapes(node):
        return args
    last = max(at for at, leaf in enumerate(args.leaves) if type(leaf) is int)
    if args.leaves[last] != size:
        return args
    return Template((*args.leaves[:last], own, *args.leaves[last + 1 :]), args.spec)


def _parted(head: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """This rank's part of what the head makes of an input that each rank has whole."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(head, torch.nn.Linear), "so the tensor plan says"
    assert is_dtensor(head.weight), "ranks share it"
    given = DTensor.from_local(x, head.weight.device_mesh, [Replicate()], run_check=False)
    made = F.linear(given, head.weight, head.bias)
    assert is_dtensor(made), "so is the weight"
    return made.to_local()


def cross_entropy(
    world: World,
    input: torch.Tensor,  # noqa: A002 (as torch's)
    target: torch.Tensor,
    weight: None = None,  # noqa: ARG001 (as torch's, of which only plain ones come here)
    size_average: None = None,  # noqa: ARG001
    ignore_index: int = -100,
    reduce: None = None,  # noqa: ARG001
    reduction: str = "mean",
    label_smoothing: float = 0.0,  # noqa: ARG001
) -> torch.Tensor:
    """As `torch.nn.functional.cross_entropy`, of logits (rows, own words) of each rank of `world`.

    >>> from evenflow.runtime.ranks.world import SingleProcess
    >>> logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    >>> torch.allclose(cross_entropy(SingleProcess(), logits, target), F.cross_entropy(logits, target))
    True
    """
    is_cast = torch.is_autocast_enabled(input.device.type)
    rows: torch.Tensor = _RowLosses.apply(input, target, ignore_index, world)  # type: ignore[no-untyped-call]  # torch's
    losses = rows if is_cast else rows.to(input.dtype)  # as torch's
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


class _RowLosses(torch.autograd.Function):
    """The loss of each row, zero where its target is ignored; in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, ignore_index: int, world: World
    ) -> torch.Tensor:
        own = logits.shape[-1]
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        highest = wide.amax(-1)
        world.highest(highest).wait()
        made = (wide - highest[:, None]).exp_()
        total = made.sum(-1)
        place = target - world.rank * own
        is_own = (place >= 0) & (place < own)
        place = torch.where(is_own, place, 0)
        right = torch.where(is_own, wide.gather(-1, place[:, None])[:, 0] - highest, 0.0)
        both = torch.stack([total, right])
        world.add_up(both).wait()
        total, right = both.unbind()
        counts = target != ignore_index
        ctx.save_for_backward(made.div_(total[:, None]), place, is_own & counts, counts)
        ctx.dtype = logits.dtype
        return torch.where(counts, total.log() - right, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        shares, place, is_own, counts = ctx.saved_tensors
        found = shares.clone()
        found[torch.arange(len(place), device=place.device), place] -= is_own.to(found.dtype)
        found *= torch.where(counts, grads[0], 0.0)[:, None]
        return found.to(ctx.dtype), None, None, None
