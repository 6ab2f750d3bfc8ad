"""What a rank allocates at its peak, in bytes, by what it is for.

Allocated bytes: what the framework asks its allocator for. What the driver's context takes, and what the
allocator can't use, is a device's `reserved_bytes`, and no part of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from evenflow.plan.choice import Degrees
from evenflow.plan.costs.stages import StageCost


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What training keeps beside each trained parameter of the model.

    - `optimizer_bytes`: for each element, between steps. AdamW of fp32 keeps 8, with a master copy of bf16
      weights 12; SGD keeps none, and 4 with momentum.
    - `update_bytes`: for each element, while the optimizer steps (temporaries of its fused loops).
    - `gradient_bytes`: for each byte of the parameter: 1 where gradients have its type, 2 for fp32 gradients
      of bf16 weights.

    >>> adamw_with_masters = TrainingState(optimizer_bytes=12.0, update_bytes=4.0, gradient_bytes=2.0)
    """

    optimizer_bytes: float = 8.0
    update_bytes: float = 4.0
    gradient_bytes: float = 1.0


@dataclass(frozen=True, slots=True)
class Peak:
    """What the ops of a rank hold at the moment when they hold most: bytes."""

    activations: float
    transients: float
    boundary: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.transients + self.boundary + self.gradients


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The bytes that a rank has allocated at its peak, by category: what is there at that moment.

    `boundary`: buffers of tensors that arrive and leave. `communicators`: what their libraries allocate.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transients: float
    boundary: float
    communicators: float

    @property
    def allocated(self) -> float:
        """All of it.

        >>> RankMemory(1.0, 1.0, 2.0, 3.0, 0.5, 0.25, 0.0).allocated
        7.75
        """
        return float(sum(getattr(self, each.name) for each in fields(self)))


def rank_memory(
    stages: Sequence[StageCost],
    peak: Peak,
    state: TrainingState,
    degrees: Degrees,
    *,
    communicator_bytes: float = 0.0,
) -> RankMemory:
    """What a rank with these stages has allocated at its peak, where its schedule's ops reach that `peak`.

    The peak lies among the ops or in the optimizer's step, when every gradient is there and no activation:
    whichever is higher counts. Gradients come with the first backwards; between data ranks they are taken to
    be there always, in buffers that are summed. Where a rank holds a part of the parameters, a step gathers
    all of its stages', which count among the transients, unless the degrees gather them node by node: the
    stage's own transients hold those already (experts are not gathered so).

    Source of the sharding: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", 2020.
    """

    def share(
        what: Callable[[StageCost], float], experts: Callable[[StageCost], float], *, are_states: bool = False
    ) -> float:
        """One rank's part of what its stages have, and data ranks with them."""
        shards = degrees.state_shards if are_states else degrees.parameter_shards
        of_experts = sum(map(experts, stages))
        others = sum(map(what, stages)) - of_experts
        return others / shards(are_experts=False) + of_experts / shards(are_experts=True)

    parameters = share(lambda s: s.parameter_bytes, lambda s: s.expert_parameter_bytes)
    gradients = share(lambda s: s.trained_bytes, lambda s: s.expert_trained_bytes) * state.gradient_bytes
    elements = share(lambda s: s.owned_elements, lambda s: s.expert_owned_elements, are_states=True)

    def gathered(stage: StageCost) -> float:
        return stage.expert_parameter_bytes if degrees.gathers_nodes else stage.parameter_bytes

    extra = sum(map(gathered, stages)) - share(gathered, lambda s: s.expert_parameter_bytes)
    in_ops = RankMemory(
        parameters=parameters,
        gradients=gradients if degrees.data > 1 else peak.gradients,
        optimizer=elements * state.optimizer_bytes,
        activations=peak.activations,
        transients=peak.transients + extra,
        boundary=peak.boundary,
        communicators=communicator_bytes,
    )
    in_update = replace(
        in_ops,
        gradients=gradients,
        activations=0.0,
        transients=elements * state.update_bytes,
        boundary=0.0,
    )
    return max(in_ops, in_update, key=lambda memory: memory.allocated)
