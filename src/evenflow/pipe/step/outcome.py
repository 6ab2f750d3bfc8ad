"""What a run of a batch comes to, and on which ranks: the loss, the metrics, a prediction."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError
from evenflow.graph.nouns.graph import Graph
from evenflow.pipe.given.reading import has_metrics
from evenflow.pipe.step.agree import Agreed
from evenflow.pipe.step.parts import Parts
from evenflow.pipe.step.result import StepResult
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.joining import join
from evenflow.runtime.stages.executor import Result

# Who gets what the last stage's process has computed: every rank, the first one, or nobody else.
Gather: TypeAlias = bool | Literal["main"]


def check_gather(gather: object) -> None:
    """Raise `ConfigError` for a `gather=` that there is not."""
    if not isinstance(gather, bool) and gather != "main":
        raise ConfigError(
            f"gather={gather!r} is none of True (every rank), 'main' (the first rank alone) and False (it "
            "stays on the rank that computed it)"
        )


def prediction(parts: Parts, results: Sequence[Result] | None, agreed: Agreed, gather: Gather) -> Any:
    """What the microbatches returned, joined, on the ranks that are to have it; collective.

    `results` are there on the last stage's processes; so it is in the rest of this file.
    """
    found = _delivered(parts.world, _joined(parts, results, agreed, join), parts.source, gather)
    return found if gather != "main" or parts.mesh.world.is_first else None


def outcome(parts: Parts, results: Sequence[Result] | None, agreed: Agreed, graph: Graph) -> StepResult:
    """Loss and metrics of a batch, on every rank; collective. `graph` is a recording of its program."""
    metrics = None
    if has_metrics(graph):
        found = _joined(parts, results, agreed, parts.joining)
        metrics = found if parts.mesh.world.size == 1 else parts.world.share(_on_host(found), parts.source)
    ref = graph.output.leaves[0]
    loss = torch.zeros((), dtype=graph.values[ref.value].info.dtype, device=parts.device)
    if parts.mesh.data.size > 1:
        return StepResult(loss, metrics, _collected(parts, results, agreed, loss))
    if results is not None:
        loss = _weighted([result.loss for result in results], agreed.shares.losses)
    return StepResult(loss, metrics, parts.world.broadcast(loss, parts.source).wait)


def _joined(
    parts: Parts,
    results: Sequence[Result] | None,
    agreed: Agreed,
    joining: Callable[[Sequence[Any], Sequence[float]], Any],
) -> Any:
    """One tree of what all microbatches returned."""
    if results is None:
        return None
    data, found = parts.mesh.data, [(result.number, result.rest) for result in results]
    if data.size > 1:
        found = [each for theirs in data.gather(_on_host(found)) for each in theirs]
    return joining([rest for _, rest in sorted(found, key=itemgetter(0))], agreed.shares.means)


def _collected(
    parts: Parts, results: Sequence[Result] | None, agreed: Agreed, loss: torch.Tensor
) -> Callable[[], object]:
    """Begin to collect the microbatches' losses from all data ranks; what is returned fills in `loss`."""
    losses = loss.new_zeros(len(agreed.shares.losses))
    if results is not None and parts.mesh.tensor.rank == 0:
        for result in results:
            assert result.loss is not None, "it was read as a loss"
            losses[result.number] = result.loss
    work = parts.mesh.world.add_up(losses)

    def fill() -> None:
        work.wait()
        loss.copy_(_weighted(list(losses), agreed.shares.losses))

    return fill


def _weighted(losses: Sequence[torch.Tensor | None], shares: Sequence[float]) -> torch.Tensor:
    """The step's loss. A microbatch that weighs nothing is left out: the mean of nothing is no number."""
    pairs = [(loss, share) for loss, share in zip(losses, shares, strict=True) if loss is not None and share]
    return torch.stack([loss * share for loss, share in pairs]).sum()


def _delivered(world: World, tree: Any, source: int, gather: Gather) -> Any:
    """`tree`, which `source` has, on the ranks that are to have it, and None on others; collective.

    Tensors come in the host's memory, but where they stay on the rank that computed them.
    """
    if world.size == 1 or gather is False:
        return tree
    if gather is True:
        return world.share(_on_host(tree), source)
    if source == 0:
        return _on_host(tree)
    return _sent(world, tree, source)


def _on_host(tree: Any) -> Any:
    """The tree with its tensors in the host's memory, as pickle is to take them."""
    return pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _sent(world: World, tree: Any, source: int) -> Any:
    """Send a tree to the first rank: its form and plain values to all, tensors to that one alone."""
    leaves: list[Any] = []
    form = None
    if world.rank == source:
        found, spec = pytree.tree_flatten(tree)
        leaves = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
        form = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in found], spec
    form = world.share(form, source)
    assert form is not None, "the source has a tree"
    if world.rank == source:
        for leaf in leaves:
            world.send(leaf, 0)
        return None
    if world.rank != 0:
        return None
    got = [
        world.receive(torch.empty_like(leaf, device=world.device), source).cpu()
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in form[0]
    ]
    return pytree.tree_unflatten(got, form[1])
