"""Placement: which rank each stage lives on."""

from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.foreign import shown


@dataclass(frozen=True, slots=True)
class Placement:
    """The rank of every stage: `rank_of[stage]`, stages counted from 0 in program order.

    Every rank from 0 to the highest holds at least one stage; anything else raises `ConfigError`.

    >>> placement = Placement((0, 1, 0, 1))
    >>> placement.num_stages, placement.num_ranks, placement.stages_on(1)
    (4, 2, (1, 3))
    """

    rank_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.rank_of:
            raise ConfigError("a placement needs at least 1 stage, got none")
        # Counted, as a file may name a rank of any size, up to which nothing is to be listed.
        if min(self.rank_of) < 0 or len(set(self.rank_of)) != max(self.rank_of) + 1:
            raise ConfigError(
                f"rank_of {shown(self.rank_of)} must use every rank from 0 to {max(self.rank_of)}, and no "
                "other: number the ranks so that each holds a stage"
            )

    @property
    def num_stages(self) -> int:
        """How many stages are placed."""
        return len(self.rank_of)

    @property
    def num_ranks(self) -> int:
        """How many ranks hold them."""
        return max(self.rank_of) + 1

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """Return the stages of one rank, ascending.

        >>> Placement.looped(2, 2).stages_on(0)
        (0, 2)
        """
        return tuple(stage for stage, owner in enumerate(self.rank_of) if owner == rank)

    @staticmethod
    def linear(num_ranks: int) -> "Placement":
        """Place one stage on each rank, in order. Raises `ConfigError` for `num_ranks < 1`.

        >>> Placement.linear(3).rank_of
        (0, 1, 2)
        """
        return Placement.looped(num_ranks, 1)

    @staticmethod
    def looped(num_ranks: int, stages_per_rank: int) -> "Placement":
        """Deal the stages out round after round, so that each rank holds every `num_ranks`-th stage.

        Raises `ConfigError` for a count below 1. Source: Narayanan et al., "Efficient Large-Scale Language
        Model Training on GPU Clusters Using Megatron-LM", 2021, section 2.2 (interleaved stages).

        >>> Placement.looped(2, 3).rank_of
        (0, 1, 0, 1, 0, 1)
        """
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, got {num_ranks}")
        if stages_per_rank < 1:
            raise ConfigError(f"stages_per_rank must be at least 1, got {stages_per_rank}")
        return Placement(tuple(range(num_ranks)) * stages_per_rank)

    @staticmethod
    def v_shape(num_ranks: int) -> "Placement":
        """Place two stages on each rank, down the ranks and back up; `ConfigError` for `num_ranks < 1`.

        The first rank so holds the first stage and the last one, and the middle two need no transfer. Source:
        Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, arXiv:2405.15362.

        >>> Placement.v_shape(3).rank_of
        (0, 1, 2, 2, 1, 0)
        """
        down = Placement.linear(num_ranks).rank_of
        return Placement(down + down[::-1])
