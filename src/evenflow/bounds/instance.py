"""Instance: what is to be scheduled, in plain numbers, before anyone asks in which order."""

import math
from dataclasses import dataclass
from functools import partial

from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.soundness import check_costs


@dataclass(frozen=True, slots=True)
class Instance:
    """What is to be scheduled: a chain of stages on ranks, their costs, delays and memory, the ranks' caps.

    Seconds of one microbatch, for each stage: `forward_seconds` (F), `input_grad_seconds` (I) and
    `weight_grad_seconds` (W; all 0 if I does both). `up_seconds[s]` passes from the end of F of stage s to
    the start of F of stage s + 1, `down_seconds[s]` from the end of I of stage s + 1 to the start of I of
    stage s; 0 on one rank. Memory, in any one unit: `held_memory` from the start of F to the end of I, then
    `kept_memory` (at most as much) to the end of W. `caps[rank]` limits the sum on a rank, or is infinite.
    """

    placement: Placement
    num_microbatches: int
    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    up_seconds: tuple[float, ...]
    down_seconds: tuple[float, ...]
    held_memory: tuple[float, ...]
    kept_memory: tuple[float, ...]
    caps: tuple[float, ...]


def instance_of(placement: Placement, num_microbatches: int, costs: Costs) -> Instance:
    """Return what is to be scheduled, for a chain of stages: ops, delays between ranks, memory and caps.

    Raises `ConfigError` for costs of other stages or ranks, and for no microbatch.

    >>> instance = instance_of(Placement.v_shape(2), 4, Costs.uniform(4, latency_seconds=0.5))
    >>> instance.up_seconds, instance.caps
    ((0.5, 0.0, 0.5), (inf, inf))
    """
    check_costs(placement, costs)
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches must be at least 1, got {num_microbatches}")
    delay = partial(costs.delay_seconds, placement=placement)
    lower_stages = range(placement.num_stages - 1)
    return Instance(
        placement,
        num_microbatches,
        costs.forward_seconds,
        costs.input_grad_seconds,
        costs.weight_grad_seconds,
        up_seconds=tuple(delay(stage, stage + 1) for stage in lower_stages),
        down_seconds=tuple(delay(stage + 1, stage) for stage in lower_stages),
        held_memory=costs.activation_bytes,
        kept_memory=costs.weight_grad_bytes,
        caps=costs.memory_caps or (math.inf,) * placement.num_ranks,
    )
