"""A choice: over how many devices each kind of parallelism goes, and how the pipeline among them works."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

# What data ranks share: nothing, the optimizer's states, everything. In the order of what it costs.
Sharding: TypeAlias = Literal["none", "zero1", "fsdp"]
Recompute: TypeAlias = Literal["none", "selective", "full"]
RECOMPUTE_NAMES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True, slots=True)
class Degrees:
    """Over how many devices each kind of parallelism goes. Expert ranks are among the data ranks.

    >>> Degrees(pipeline=4, data=2).num_devices
    8
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    sharding: Sharding = "none"

    @property
    def num_devices(self) -> int:
        """How many devices that takes."""
        return self.pipeline * self.data * self.tensor * self.context

    @property
    def gathers_nodes(self) -> bool:
        """Whether parameters are gathered node by node, while these run; in a pipeline, once for a step.

        >>> Degrees(data=8, sharding="fsdp").gathers_nodes, Degrees(4, 2, sharding="fsdp").gathers_nodes
        (True, False)
        """
        return self.sharding == "fsdp" and self.pipeline == 1 and self.data > 1

    def num_alike(self, *, are_experts: bool) -> int:
        """How many data ranks have the same parameters: all, or of experts those that have the same ones."""
        return self.data // self.expert if are_experts else self.data

    def parameter_shards(self, *, are_experts: bool) -> int:
        """In how many parts data ranks hold parameters and gradients.

        >>> Degrees(data=8, expert=4, sharding="fsdp").parameter_shards(are_experts=True)
        2
        """
        return self.num_alike(are_experts=are_experts) if self.sharding == "fsdp" else 1

    def state_shards(self, *, are_experts: bool) -> int:
        """In how many parts data ranks hold the optimizer's states.

        >>> Degrees(data=8, sharding="zero1").state_shards(are_experts=False)
        8
        """
        return 1 if self.sharding == "none" else self.num_alike(are_experts=are_experts)


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of the space that is searched."""

    degrees: Degrees
    stages_per_rank: int
    schedule: str
    microbatch_size: int
    num_microbatches: int
    recompute: Recompute


def describe(choice: Choice) -> str:
    """A choice in a line.

    >>> describe(Choice(Degrees(4, 2), 1, "1f1b", 2, 16, "none"))
    '4 pipeline x 2 data ranks, 1f1b, 16 microbatches of 2'
    """
    degrees = choice.degrees
    kinds = {
        "pipeline": degrees.pipeline,
        "data": degrees.data,
        "tensor": degrees.tensor,
        "context": degrees.context,
    }
    parts = [f"{number} {name}" for name, number in kinds.items() if number > 1 or name == "pipeline"]
    text = f"{' x '.join(parts)} rank{'s' if degrees.num_devices > 1 else ''}"
    text += f", experts over {degrees.expert}" if degrees.expert > 1 else ""
    text += f" ({degrees.sharding})" if degrees.sharding != "none" else ""
    text += f", {choice.schedule}" if degrees.pipeline > 1 else ""
    text += f" with {choice.stages_per_rank} stages a rank" if choice.stages_per_rank > 1 else ""
    number = choice.num_microbatches
    text += f", {number} microbatch{'es' if number > 1 else ''} of {choice.microbatch_size}"
    return text + (f", {choice.recompute} recomputation" if choice.recompute != "none" else "")
