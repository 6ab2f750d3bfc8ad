"""What a run of a batch comes to on every rank: the loss, the metrics, a prediction."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from evenflow.graph.graph import Graph
from evenflow.pipe.agree import Agreed
from evenflow.pipe.delivered import Gather, delivered, on_host
from evenflow.pipe.parts import Parts
from evenflow.pipe.reading import has_metrics
from evenflow.pipe.result import StepResult
from evenflow.runtime.executor import Result
from evenflow.runtime.joining import join


def prediction(parts: Parts, results: Sequence[Result] | None, agreed: Agreed, gather: Gather) -> Any:
    """What the microbatches returned, joined, on the ranks that are to have it; collective.

    `results` are there on the last stage's processes; so it is in the rest of this file.
    """
    found = delivered(parts.world, _joined(parts, results, agreed, join), parts.source, gather)
    return found if gather != "main" or parts.mesh.world.is_first else None


def outcome(parts: Parts, results: Sequence[Result] | None, agreed: Agreed, graph: Graph) -> StepResult:
    """Loss and metrics of a batch, on every rank; collective. `graph` is a recording of its program."""
    metrics = None
    if has_metrics(graph):
        found = _joined(parts, results, agreed, parts.joining)
        metrics = found if parts.mesh.world.size == 1 else parts.world.share(on_host(found), parts.source)
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
        found = [each for theirs in data.gather(on_host(found)) for each in theirs]
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
