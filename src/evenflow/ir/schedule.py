"""Schedule: in which order each rank computes, before anyone asks how values travel."""

from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.ir.op import ComputeOp, Forward, parts
from evenflow.ir.placement import Placement


@dataclass(frozen=True, slots=True)
class Schedule:
    """The compute ops of every rank, in the order in which that rank performs them.

    `ranks[rank]` is one rank's queue. It holds no transfers: `lower` adds them. Raises `ConfigError` for
    `num_microbatches < 1`. Whether the ops are complete and can be executed is judged by `simulate` and by
    `validate.prove`, which list all faults at once, and not here.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2)
    >>> " ".join(str(op) for op in schedule.ranks[1])
    '1F0 1F1 1B0 1B1'
    >>> schedule.trains
    True
    """

    name: str
    placement: Placement
    num_microbatches: int
    ranks: tuple[tuple[ComputeOp, ...], ...]

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise ConfigError(f"num_microbatches must be at least 1, got {self.num_microbatches}")

    @property
    def trains(self) -> bool:
        """Whether any backward is scheduled; without one it is an evaluation."""
        return any(
            not isinstance(part, Forward) for queue in self.ranks for op in queue for part in parts(op)
        )
