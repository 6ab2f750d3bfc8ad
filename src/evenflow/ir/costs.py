"""Costs: how long the ops of each stage take, in seconds."""

import math
from dataclasses import dataclass
from typing import assert_never

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, ComputeOp, Forward


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one forward and one backward of one microbatch for each stage, and of one transfer.

    `transfer_seconds` is the latency of one transfer between different ranks; stages of one rank hand over
    for nothing. Raises `ConfigError` if the two tuples differ in length or a cost is negative or not finite.

    >>> costs = Costs(forward_seconds=(0.5, 1.0), backward_seconds=(1.0, 2.0))
    >>> costs.num_stages, costs.seconds(Backward(stage=1, microbatch=0))
    (2, 2.0)
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: float = 0.0

    def __post_init__(self) -> None:
        if len(self.forward_seconds) != len(self.backward_seconds):
            raise ConfigError(
                f"costs name {len(self.forward_seconds)} stages forward and "
                f"{len(self.backward_seconds)} backward: give each stage both"
            )
        every = (*self.forward_seconds, *self.backward_seconds, self.transfer_seconds)
        if wrong := [cost for cost in every if not (math.isfinite(cost) and cost >= 0)]:
            raise ConfigError(f"costs must be finite seconds of at least 0, got {wrong}")

    @property
    def num_stages(self) -> int:
        """How many stages are priced."""
        return len(self.forward_seconds)

    def seconds(self, op: ComputeOp) -> float:
        """Return the seconds that one compute op takes.

        >>> Costs.uniform(2).seconds(Forward(stage=0, microbatch=5))
        1.0
        """
        match op:
            case Forward():
                return self.forward_seconds[op.stage]
            case Backward():
                return self.backward_seconds[op.stage]
            case _:
                assert_never(op)

    @staticmethod
    def uniform(
        num_stages: int,
        forward_seconds: float = 1.0,
        backward_seconds: float = 2.0,
        transfer_seconds: float = 0.0,
    ) -> "Costs":
        """Return equal costs for every stage; by default a backward costs two forwards.

        Two, because a backward multiplies matrices for the inputs and again for the weights.

        >>> Costs.uniform(2).backward_seconds
        (2.0, 2.0)
        """
        return Costs((forward_seconds,) * num_stages, (backward_seconds,) * num_stages, transfer_seconds)
