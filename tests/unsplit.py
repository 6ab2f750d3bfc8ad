"""Compare a pipeline with the unsplit model: loss, gradients and buffers of one step."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

import evenflow
from evenflow.checkpoint.load import open_checkpoint
from evenflow.graph.cutting.positions import legal_positions
from evenflow.graph.nouns.graph import Graph
from evenflow.pipe.given import cuts
from evenflow.runtime.recorded.microbatch import Microbatches, split

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Step:
    """What one step without an update leaves behind."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def plain_step(model: torch.nn.Module, loss: Loss, items: list[Any]) -> Step:
    """One step of a plain loop over microbatches of the same size."""
    parts = []
    for item in items:
        returned = loss(model, copied(item))
        part = returned[0] if isinstance(returned, tuple) else returned
        part.backward(torch.full_like(part, 1 / len(items)))
        parts.append(part.detach() * (1 / len(items)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(torch.stack(parts).sum(), gradients, buffers_of(model))


def pipeline_step(pipe: evenflow.Pipeline, model: torch.nn.Module, batch: Any) -> Step:
    loss = pipe.step(batch).loss
    gradients = {name: g for name, g in pipe.named_gradients() if g is not None}
    return Step(loss, gradients, buffers_of(model))


def copied(tree: Any) -> Any:
    """The tree with copies of its tensors."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def buffers_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_step(found: Step, expected: Step, *, tolerance: float = 0.0) -> None:
    """Bit for bit, or within `tolerance` of each tensor's maximum."""
    same(found.loss, expected.loss, tolerance, "the loss")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        same(found.gradients[name], gradient, tolerance, f"the gradient of {name}")
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        same(found.buffers[name], buffer, tolerance, name)


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    if tolerance and expected.is_floating_point():
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), what
    else:
        assert torch.equal(found, expected), f"{what} differs by {(found - expected).abs().max():.1e}"


@contextlib.contextmanager
def random_cuts(seed: int, stages: int) -> Iterator[None]:
    """Pipelines made meanwhile are cut at random legal places."""

    def positions(graph: Graph, *_: Any) -> tuple[int, ...]:
        legal = legal_positions(graph)
        places = [at for at in range(1, len(graph.chain)) if legal[at]]
        return tuple(sorted(random.Random(seed).sample(places, stages - 1)))

    with mock.patch.object(cuts, "positions_of", positions):
        yield


def assert_splits(
    build: Callable[[], torch.nn.Module],
    batch: Any,
    *,
    loss: Loss,
    num_microbatches: int = 2,
    tolerance: float = 0.0,
    stages: tuple[int, ...] = (2, 3),
    **options: Any,
) -> None:
    """Every cut of the model gives the unsplit model's numbers, taken apart as far as can be.

    Cuts: none; where there are `stages`, balanced, in the fewest of them, and twice at random, in the most.
    `build` gives the same numbers every time.
    """
    items = batch.items if isinstance(batch, Microbatches) else split(batch, num_microbatches)
    expected = plain_step(build(), loss, list(items))
    before = copied(batch)
    split_up = ((min(stages), None), (max(stages), 0), (max(stages), 1)) if stages else ()
    for number, seed in ((1, None), *split_up):
        model = build()
        arguments = {
            "loss": loss,
            "example": batch,
            "stages": number,
            "max_leaf_share": 0.0,
            "reduction": "item-mean",
            "num_microbatches": None if isinstance(batch, Microbatches) else num_microbatches,
        }
        with random_cuts(seed, number) if seed is not None else contextlib.nullcontext():
            pipe = evenflow.pipeline(model, **(arguments | options))
        assert_same_step(pipeline_step(pipe, model, batch), expected, tolerance=tolerance)
        pipe.close()
    for mine, theirs in zip(pytree.tree_leaves(batch), pytree.tree_leaves(before), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), "the user's batch was changed"


def seeded(build: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
    """A builder that gives the same numbers every time."""

    def built() -> torch.nn.Module:
        torch.manual_seed(0)
        return build().train()

    return built


def mlp(*widths: int) -> torch.nn.Sequential:
    """Linear layers with a tanh after each but the last; the same numbers every time."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def mean_square(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])


def regression(rows: int = 8, width: int = 4) -> dict[str, torch.Tensor]:
    """A batch for `mlp(width, ..., 1)` and `mean_square`."""
    generator = torch.Generator().manual_seed(rows)
    return {
        "x": torch.randn(rows, width, generator=generator),
        "y": torch.randn(rows, 1, generator=generator),
    }


def saved_model(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a checkpoint, by name."""
    checkpoint = open_checkpoint(folder)
    keys = [key for key in checkpoint.table if key.startswith("model.")]
    return {key.removeprefix("model."): tensor for key, tensor in checkpoint.tensors(keys).items()}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
