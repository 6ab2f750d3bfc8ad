"""What a rank allocates at its peak, in bytes, by what it is for.

Allocated bytes: what the framework asks its allocator for. What the driver's context takes, and what the
allocator can't use, is a device's `reserved_bytes`, and no part of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from evenflow.plan.stages import StageCost

Sharding: TypeAlias = Literal["none", "zero1", "fsdp"]  # of data ranks: nothing, optimizer states, everything


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What training keeps beside each trained parameter of the model.

    - `optimizer_bytes`: for each element, between steps. AdamW of fp32 keeps 8, with a master copy of bf16
      weights 12; SGD keeps none, and 4 with momentum.
    - `update_bytes`: for each element, while the optimizer steps (temporaries of its fused loops).
    - `gradient_bytes`: for each byte of the parameter: 1 where gradients have its type, 2 for fp32 gradients
      of bf16 weights.
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
    *,
    data_ranks: int = 1,
    expert_ranks: int = 1,
    sharding: Sharding = "none",
    gathers_nodes: bool = False,
    communicator_bytes: float = 0.0,
) -> RankMemory:
    """What a rank with these stages has allocated at its peak, where its schedule's ops reach that `peak`.

    The peak lies among the ops or in the optimizer's step, when every gradient is there and no activation:
    whichever is higher counts. Gradients come with the first backwards; between data ranks they are taken to
    be there always, in buffers that are summed. With "zero1" the data ranks share the optimizer's states,
    with "fsdp" parameters and gradients too; a step then gathers all of its stages' parameters, which count
    among the transients, unless it `gathers_nodes` one after the other: the stage's own transients hold those
    already (experts are not gathered so). Of the data ranks, `expert_ranks` have other experts each, so that
    experts are shared by so many times fewer.

    Source of the sharding: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", 2020.
    """
    shards = data_ranks if sharding != "none" else 1
    whole = data_ranks if sharding == "fsdp" else 1

    def share(what: Callable[[StageCost], float], experts: Callable[[StageCost], float], of: int) -> float:
        """One rank's part where `of` share everything."""
        of_experts = sum(map(experts, stages))
        return (sum(map(what, stages)) - of_experts) / of + of_experts / max(1, of // expert_ranks)

    parameters = share(lambda s: s.parameter_bytes, lambda s: s.expert_parameter_bytes, whole)
    gradients = share(lambda s: s.trained_bytes, lambda s: s.expert_trained_bytes, whole)
    gradients *= state.gradient_bytes
    elements = share(lambda s: s.owned_elements, lambda s: s.expert_owned_elements, shards)

    def gathered(stage: StageCost) -> float:
        return stage.expert_parameter_bytes if gathers_nodes else stage.parameter_bytes

    extra = sum(map(gathered, stages)) - share(gathered, lambda s: s.expert_parameter_bytes, whole)
    in_ops = RankMemory(
        parameters=parameters,
        gradients=gradients if data_ranks > 1 else peak.gradients,
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
