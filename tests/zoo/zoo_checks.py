"""What every model of the zoo is held to: two steps of a pipeline leave what the plain loop leaves."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import evenflow
from evenflow.graph.nouns.template import flatten_tree
from evenflow.runtime.recorded.joining import join
from unsplit import (
    Loss,
    Step,
    assert_same_step,
    buffers_of,
    copied,
    mean_square,
    plain_step,
    random_cuts,
    seeded,
    sgd,
)

WIDTH = 8
ROWS = 4  # of a microbatch
NUM_MICROBATCHES = 3


def vectors(step: int) -> list[Any]:
    """Microbatches for `mean_square`: x and y."""
    return many(step, lambda: {"x": torch.randn(ROWS, WIDTH), "y": torch.randn(ROWS, 1)})


def sequences(step: int) -> list[Any]:
    return many(step, lambda: {"x": torch.randn(ROWS, 6, WIDTH), "y": torch.randn(ROWS, 1)})


def images(step: int) -> list[Any]:
    return many(step, lambda: {"x": torch.randn(ROWS, 3, 8, 8), "y": torch.randn(ROWS, 1)})


def tokens(step: int) -> list[Any]:
    return many(step, lambda: {"x": torch.randint(0, 16, (ROWS, 6)), "y": torch.randint(0, 16, (ROWS, 6))})


def many(step: int, make: Callable[[], Any]) -> list[Any]:
    """Microbatches of one step, each with numbers of its own; the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + step)
        return [make() for _ in range(NUM_MICROBATCHES)]


def token_loss(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained.

    `shared`: a parameter is used more than once, so that sums are associated otherwise than in the plain
    loop; `draws`: random numbers come from Evenflow's own streams. Both are compared with one stage.
    `between` is what the user does to the model between the steps.
    `library` must be there, or the test is skipped. `refused` is part of the message of those that are
    refused by name.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    loss: Loss = mean_square
    items: Callable[[int], list[Any]] = vectors
    shared: bool = False
    draws: bool = False
    tolerance: float = 1e-6
    stages: tuple[int, int] = (2, 4)
    between: Callable[[Any], None] = lambda _: None
    library: str = ""
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)


class Zoo:
    """Collects cases: `@zoo.model(loss=…)` above a class or a function that makes the model."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def model(self, **settings: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        def add(build: Callable[[], Any]) -> Callable[[], Any]:
            self.cases.append(Case(build.__name__, seeded(build), **settings))
            return build

        return add

    def params(self) -> list[Any]:
        """The cases as pytest parameters."""
        assert len({case.name for case in self.cases}) == len(self.cases), "two cases of one name"
        return [pytest.param(case, id=case.name) for case in self.cases]


@dataclass(frozen=True)
class Trained:
    """What each of two steps left, and what the loss function returned beside the loss."""

    steps: tuple[Step, ...]
    rests: tuple[Any, ...]


def check(case: Case) -> None:
    """Hold one case to what all are held to: in few stages of large leaves, in more of small ones."""
    if case.library:
        pytest.importorskip(case.library, exc_type=ImportError)
    if case.refused:
        with pytest.raises(evenflow.EvenflowError) as refusal:
            in_pipeline(case, case.stages[1], None)
        assert case.refused in "\n".join([str(refusal.value), *getattr(refusal.value, "__notes__", [])])
        return
    if case.shared or case.draws:
        expected = in_pipeline(case, 1, None)
        if not case.draws:
            assert_same(expected, in_plain_loop(case), tolerance=case.tolerance)
    else:
        expected = in_plain_loop(case)
    few, most = case.stages
    assert_same(in_pipeline(case, few, None), expected)
    with random_cuts(0, most):
        assert_same(in_pipeline(case, most, 0.0), expected)


def in_plain_loop(case: Case) -> Trained:
    model, rests, steps = case.build(), [], []
    optimizer = sgd(model.parameters())

    def noting(inner: torch.nn.Module, item: Any) -> Any:
        returned = case.loss(inner, item)
        found.append(returned[1] if isinstance(returned, tuple) else None)
        found[-1] = mapped(lambda leaf: leaf.detach().clone(), found[-1])
        return returned

    for number in range(2):
        found: list[Any] = []
        optimizer.zero_grad()
        items = case.items(number)
        step = plain_step(model, noting, items)
        steps.append(Step(step.loss, copied(step.gradients), step.buffers))
        rests.append(join(found, [1 / len(items)] * len(items)))
        optimizer.step()
        case.between(model)
    return Trained(tuple(steps), tuple(rests))


def in_pipeline(case: Case, stages: int, max_leaf_share: float | None) -> Trained:
    model, rests, steps = case.build(), [], []
    pipe = evenflow.pipeline(
        model,
        loss=case.loss,
        example=evenflow.Microbatches(case.items(0)),
        optimizer=sgd,
        stages=stages,
        max_leaf_share=max_leaf_share,
        exact=case.shared,
        reduction="item-mean",
        **case.options,
    )
    with contextlib.closing(pipe):
        for number in range(2):
            items = case.items(number)
            before = copied(items)
            result = pipe.step(evenflow.Microbatches(items))
            assert_same_tree(items, before)
            gradients = {name: g.clone() for name, g in pipe.named_gradients() if g is not None}
            steps.append(Step(result.loss, gradients, buffers_of(model)))
            rests.append(result.metrics)
            case.between(model)
    return Trained(tuple(steps), tuple(rests))


def assert_same(found: Trained, expected: Trained, *, tolerance: float = 0.0) -> None:
    for mine, theirs in zip(found.steps, expected.steps, strict=True):
        assert_same_step(mine, theirs, tolerance=tolerance)
    for mine, theirs in zip(found.rests, expected.rests, strict=True):
        assert_same_tree(mine, theirs, tolerance=tolerance)


def assert_same_tree(found: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    """The same containers, and leaves of the same types with the same contents."""
    (mine, my_spec), (theirs, their_spec) = flatten_tree(found), flatten_tree(expected)
    assert my_spec == their_spec
    for one, other in zip(mine, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            near = torch.allclose(one, other, rtol=tolerance, atol=tolerance) if tolerance else False
            assert near or torch.equal(one, other)
        else:
            assert one == other


def mapped(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The tree with `change` applied to its tensors, those inside dataclasses too."""
    leaves, spec = flatten_tree(tree)
    return pytree.tree_unflatten(
        [change(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
    )
