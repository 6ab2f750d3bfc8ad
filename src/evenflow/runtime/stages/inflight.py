"""InFlight: all the state of one (stage, microbatch) between its first arrival and its last departure."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from evenflow.runtime.links.link import Parcel
from evenflow.runtime.program.backward import Walk
from evenflow.runtime.program.offload import Away
from evenflow.runtime.program.weight_grads import WeightGrads
from evenflow.runtime.program.work import Work


@dataclass(slots=True)
class InFlight:
    """Filled by arrivals, emptied by departures; nothing is left in it when the step ends.

    `weight` is the gradient of the step's loss with respect to this microbatch's.
    """

    work: Work
    weight: float = 1.0
    activations: dict[int, Parcel] = field(default_factory=dict)  # arrived, by source stage
    gradients: dict[int, Parcel] = field(default_factory=dict)  # arrived, by source stage
    # Of tensors that get a gradient from later stages; None for one that has no graph.
    roots: dict[int, GradientEdge | None] = field(default_factory=dict)
    made: dict[int, Parcel] = field(default_factory=dict)  # activations to send, by target stage
    owed: dict[int, torch.Tensor] = field(default_factory=dict)  # gradients to send, by value
    put_off: WeightGrads = field(default_factory=WeightGrads)  # what `InputGrad` left to `WeightGrad`
    walk: Walk | None = None  # where nobody waits for a gradient: all of it is left
    away: Away | None = None  # what waits for the backward on the host
    output: Any = None  # what the loss function returned, on the last stage
    loss: torch.Tensor | None = None  # of that the loss, where the backward starts

    @property
    def weighs_nothing(self) -> bool:
        """Whether its loss is no part of the step's."""
        return self.loss is not None and not self.weight
