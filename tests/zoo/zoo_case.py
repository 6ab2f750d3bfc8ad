"""A model of the zoo, and what is demanded of it: the unsplit model's numbers from every cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import evenflow
from evenflow.runtime.recorded.joining import join
from evenflow.runtime.recorded.microbatch import Microbatches, split
from unsplit import Loss, Step, buffers_of, copied, plain_step

CACHES = ("past_key_values", "cache_params")


def loss_and_output(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """The model's own loss, and as metrics all that it returned but a key/value cache."""
    output = model(**batch)
    kept = {key: value for key, value in output.items() if key not in CACHES}
    return output.loss, type(output)(**kept)


def loss_and_whole_output(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """The model's own loss, and as metrics all that it returned."""
    output = model(**batch)
    return output.loss, output


@dataclass(frozen=True)
class Case:
    """A tiny model and a batch for it.

    `build` gives a model in training mode, with the same numbers every time; `batch` a batch whose
    microbatches hold different data. `exact`: a parameter is used in several places. `refused`: a pattern of
    what is said of one that is refused by name.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    batch: Callable[[], Any]
    loss: Loss = loss_and_output
    exact: bool = False
    num_microbatches: int = 3
    reduction: Any = "item-mean"
    refused: str = ""


@dataclass(frozen=True)
class Outcome:
    """One step, what the loss function returned beside the loss, and what it returned in evaluation mode."""

    step: Step
    metrics: Any
    prediction: Any


def plain_outcome(case: Case) -> Outcome:
    """What the unsplit model gives in a plain loop over the same microbatches."""
    batch, model = case.batch(), case.build()
    items = list(batch.items) if isinstance(batch, Microbatches) else split(batch, case.num_microbatches)
    model.eval()
    with torch.no_grad():
        predictions = [case.loss(model, copied(item)) for item in items]
    model.train()
    returned: list[Any] = []

    def watched(model: Any, item: Any) -> Any:
        returned.append(case.loss(model, item))
        return returned[-1]

    step = plain_step(model, watched, items)
    rests = [each[1] if isinstance(each, tuple) else None for each in returned]
    parts = [1 / len(items)] * len(items)
    return Outcome(step, join(rests, parts), join(predictions, parts))


def pipeline_outcome(
    case: Case, *, stages: int, max_leaf_share: float | None, predicts: bool = False
) -> Outcome:
    """What a pipeline gives; a prediction where it is to make one."""
    model, batch = case.build(), case.batch()
    pipe = evenflow.pipeline(
        model,
        loss=case.loss,
        example=batch,
        stages=stages,
        num_microbatches=None if isinstance(batch, Microbatches) else case.num_microbatches,
        max_leaf_share=max_leaf_share,
        exact=case.exact,
        reduction=case.reduction,
    )
    prediction = pipe.predict(batch, case.loss) if predicts else None
    result = pipe.step(batch)
    gradients = {name: gradient for name, gradient in pipe.named_gradients() if gradient is not None}
    pipe.close()
    return Outcome(Step(result.loss, gradients, buffers_of(model)), result.metrics, prediction)


def assert_alike(found: Any, expected: Any, where: str) -> None:
    """Fail where two things differ in type, structure, or a single bit of a tensor."""
    assert type(found) is type(expected), f"{where}: {type(found)} and not {type(expected)}"
    match expected:
        case torch.Tensor():
            assert found.shape == expected.shape, where
            assert found.dtype == expected.dtype, where
            assert torch.equal(found, expected), f"{where} differs"
        case Mapping():
            assert found.keys() == expected.keys(), where
            for key in expected:
                assert_alike(found[key], expected[key], f"{where}.{key}")
        case list() | tuple():
            assert len(found) == len(expected), where
            for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert_alike(mine, theirs, f"{where}[{index}]")
        case type() | torch.nn.Module() | torch.dtype() | torch.device():
            assert found is expected or found == expected, where
        case _ if hasattr(expected, "__dict__") and not callable(expected):
            assert_alike(vars(found), vars(expected), where)
        case _:
            assert found == expected, where
