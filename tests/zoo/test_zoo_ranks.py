"""Some of the zoo on two processes: the numbers of the unsplit model, each owned by one rank."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from zoo_case import Case, assert_alike, pipeline_outcome, plain_outcome
from zoo_transformers import CASES, ON_RANKS

import evenflow
from unsplit import Step, assert_same_step

BY_NAME = {case.name: case for case in CASES}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Share:
    """What one rank has of a step: its own gradients and buffers, and what is the same on every rank."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    metrics: Any
    prediction: Any


def on_a_rank() -> list[Share]:
    """Every chosen case on this rank of two."""
    torch.set_num_threads(1)
    return [one(BY_NAME[name]) for name in ON_RANKS]


def one(case: Case) -> Share:
    model, batch = case.build(), case.batch()
    pipe = evenflow.pipeline(
        model,
        loss=case.loss,
        example=batch,
        num_microbatches=case.num_microbatches,
        exact=case.exact,
        reduction="item-mean",
    )
    prediction = pipe.predict(batch, case.loss)
    result = pipe.step(batch)
    gradients = {name: gradient.clone() for name, gradient in pipe.named_gradients() if gradient is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers() if name in pipe._parts.buffers}
    pipe.close()
    return Share(result.loss.clone(), gradients, buffers, result.metrics, prediction)


@cache
def from_ranks() -> list[list[Share]]:
    return evenflow.launch(on_a_rank, nproc=2)


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_processes_give_the_numbers_of_the_unsplit_model(name):
    shares = [found[ON_RANKS.index(name)] for found in from_ranks()]
    case, expected = BY_NAME[name], plain_outcome(BY_NAME[name])
    buffers = {key: tensor for share in shares for key, tensor in share.buffers.items()}
    found = Step(
        shares[0].loss,
        {key: tensor for share in shares for key, tensor in share.gradients.items()},
        expected.step.buffers | buffers,
    )
    assert sum(len(share.gradients) for share in shares) == len(found.gradients), "owned by one rank each"
    assert all(share.gradients for share in shares), "every rank owns something"
    if case.exact:
        assert_same_step(found, pipeline_outcome(case, stages=1, max_leaf_share=None).step)
        assert_same_step(found, expected.step, tolerance=TOLERANCE)
    else:
        assert_same_step(found, expected.step)
    for share in shares:
        assert torch.equal(share.loss, found.loss), "the same on every rank"
        assert_alike(share.metrics, expected.metrics, "metrics")
        assert_alike(share.prediction, expected.prediction, "prediction")
