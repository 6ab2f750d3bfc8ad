"""The programs of a pipeline that is given none: the model itself is called, and computes its loss itself."""

from collections.abc import Mapping
from typing import Any

import torch

from evenflow.errors import ConfigError


def call_model(model: Any, microbatch: Any) -> Any:
    """The model applied to a microbatch: a mapping's entries are keyword arguments."""
    return model(**microbatch) if isinstance(microbatch, Mapping) else model(microbatch)


def model_loss(model: Any, microbatch: Any) -> Any:
    """The loss that the model itself computes, as Hugging Face's models do when given labels."""
    if not isinstance(microbatch, Mapping):
        raise ConfigError(
            "without loss=, a batch must be a mapping of the model's arguments; "
            "give loss=lambda model, batch: …"
        )
    output = model(**microbatch)
    loss = getattr(output, "loss", None)
    if loss is None:
        kind = "Tensor" if isinstance(output, torch.Tensor) else type(output).__name__
        raise ConfigError(
            f"{type(model).__name__} returned {kind} without a loss; put labels into the batch, or give loss="
        )
    return loss
