"""A recorded program that is to be measured, with all that it takes to run parts of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evenflow.graph.nouns.graph import Graph


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph, the model and the microbatch of which it was recorded, and the device to run it on.

    `batch` holds the microbatch's tensors, of `num_rows` rows.
    """

    graph: Graph
    model: torch.nn.Module
    batch: Sequence[torch.Tensor]
    num_rows: int
    device: torch.device
