"""What a step gives back: the same on every rank, waiting for the device only when it is read."""

from collections.abc import Callable
from typing import Any

import torch


class StepResult:
    """The outcome of one step, or of `evaluate`.

    `loss` is a 0-dimensional tensor: that of the whole batch (`Pipeline.reduction` says how microbatches are
    weighed). `metrics` is what the loss function returned beside the loss (None where it returned the loss
    alone), joined over microbatches. `grad_norm` is a 0-dimensional tensor, that of all gradients before they
    were clipped, where the step was to update parameters and the pipeline clips, computes in float16 or looks
    for bad numbers. `bad_numbers` says which there were in a step that was left out for them; else None.

    >>> result = StepResult(torch.tensor(2.0), {"accuracy": 0.5})
    >>> float(result.loss), result.metrics
    (2.0, {'accuracy': 0.5})
    """

    def __init__(self, loss: torch.Tensor, metrics: Any, wait: Callable[[], Any] | None = None) -> None:
        self._loss, self._wait = loss, wait
        self.metrics = metrics
        self.grad_norm: torch.Tensor | None = None
        self.bad_numbers: str | None = None

    @property
    def loss(self) -> torch.Tensor:
        """The loss of the whole batch, on its device."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._loss

    def __repr__(self) -> str:
        return f"StepResult(loss={float(self.loss):.6g}, metrics={self.metrics!r})"
