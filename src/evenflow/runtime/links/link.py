"""The contract of every link: parcels of one pair of ranks arrive in the order in which they were sent."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.op import Recv, Send

# What one transfer carries: the edge's values in the section's order; None where a gradient does not exist.
Parcel = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a parcel holds: the recorded facts of its values, and a key equal for parcels made alike.

    Strides and existence of *gradients* are known only once a first one was computed; a link that needs them
    beforehand learns them with the first parcel of each key.
    """

    key: tuple[Any, ...]  # (recording, source stage, target stage, payload): hashable
    values: tuple[TensorInfo, ...]
    device: torch.device  # where the receiver wants it


class Link(ABC):
    """Moves parcels between ranks and knows no stage's inside. Calls follow the rank's program order.

    `receives_ahead` and `sends_ahead`: how many parcels have memory of the receiver's before they are used,
    and of the sender's after they were sent.
    """

    receives_ahead: int = 0
    sends_ahead: int = 0

    @abstractmethod
    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        """A step begins in which this rank will receive these, in this order."""

    @abstractmethod
    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        """Send, without waiting for more than the link must; the link keeps the tensors alive meanwhile."""

    @abstractmethod
    def post(self, op: Recv) -> None:
        """The program's place for this receive is reached: have it under way."""

    @abstractmethod
    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        """Send and post all of these as one group: none of them waits for another of them."""

    @abstractmethod
    def take(self, op: Recv) -> Parcel:
        """Wait for a posted receive and hand over the parcel."""

    @abstractmethod
    def finish(self) -> None:
        """The step is over: wait until everything sent has left."""
