"""What is to be planned: a program at any microbatch size, the machine, the batch, and what is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from evenflow.cluster.cluster import Cluster
from evenflow.errors import ConfigError
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice, Recompute, Sharding
from evenflow.plan.costs.overheads import Overheads
from evenflow.plan.rank_memory import TrainingState


@dataclass(frozen=True, slots=True)
class Levers:
    """What the user has decided; None where the planner decides.

    The planner itself goes over up to 8 tensor ranks and 64 expert ranks, and no context ranks.

    >>> Levers(pipeline=4, schedule="1f1b").data is None
    True
    """

    pipeline: int | None = None
    data: int | None = None
    tensor: int | None = None
    context: int | None = None
    expert: int | None = None
    sharding: Sharding | None = None
    stages_per_rank: int | None = None
    schedule: str | None = None
    microbatch_size: int | None = None
    num_microbatches: int | None = None
    recompute: Recompute | None = None

    def pipeline_only(self) -> "Levers":
        """The same, with no other parallelism than a pipeline's.

        >>> Levers(pipeline=2).pipeline_only() == Levers(2, data=1, tensor=1, context=1)
        True
        """
        return replace(self, data=1, tensor=1, context=1)


@dataclass(frozen=True, slots=True)
class Limits:
    """What another system can run: whether it `lays_out` a choice, and `allows` it with its savings."""

    lays_out: Callable[[Choice], bool]
    allows: Callable[[Choice], bool]


@dataclass(frozen=True)
class Request:
    """A question to the planner.

    - `chain_of(rows)`: the program for a microbatch of so many rows, in seconds of each kind of device of the
      cluster. `microbatch_sizes` are those that it can be asked for.
    - `batch_rows` and `row_tokens`: the batch of one step, over all data ranks, and the tokens of one row.
    - `max_leaf_share`: how fine the program was recorded.
    - `state`: what training keeps beside the parameters.
    - `overheads`: what the runtime takes beside the nodes.
    - `update_seconds_per_byte`: the optimizer's step, for each byte of trained parameters, by the kind of
      device; where a kind is not named, its memory's speed decides.
    - `dtype`: the type that the model computes in, whose peak rates the MFU is a share of.
    - `limits`: what may be chosen at all; anything where there are none.

    Raises `ConfigError` for a batch without a row, and for no size of a microbatch. `planner.plan` answers.
    """

    chain_of: Callable[[int], Chain]
    microbatch_sizes: tuple[int, ...]
    cluster: Cluster
    batch_rows: int
    row_tokens: float
    max_leaf_share: float
    state: TrainingState = field(default_factory=TrainingState)
    overheads: Overheads = field(default_factory=Overheads)
    update_seconds_per_byte: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    dtype: str = "bfloat16"
    levers: Levers = field(default_factory=Levers)
    limits: Limits | None = None

    def with_memory(self, memory_bytes: float | None) -> "Request":
        """The same question for devices of so much memory each; None leaves it as it is."""
        if memory_bytes is None:
            return self
        return replace(self, cluster=self.cluster.with_memory(memory_bytes))

    def lays_out(self, choice: Choice) -> bool:
        """Whether a choice is within the limits, whatever is shared and recomputed."""
        return self.limits is None or self.limits.lays_out(choice)

    def allows(self, choice: Choice) -> bool:
        """Whether a choice with its savings is within the limits."""
        return self.limits is None or self.limits.allows(choice)

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or not self.microbatch_sizes:
            raise ConfigError(
                f"a batch of {self.batch_rows} rows in microbatches of {self.microbatch_sizes}: plan for at "
                "least one row"
            )
