"""Sizes that a method can serve, and how others are refused."""

from evenflow.errors import ConfigError
from evenflow.ir.placement import Placement

# Some minutes of work; beyond, a slip of the finger is likelier than a wish.
_MAX_OPS = 5_000_000
_MAX_PLACES = 50_000_000


def check_workable(num_ranks: int, num_stages: int, num_microbatches: int) -> None:
    """Refuse sizes of hours, whatever the method: ops are made one by one, each stage sought on each rank.

    >>> check_workable(num_ranks=4, num_stages=4, num_microbatches=10**9)
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: 4 stages × 1000000000 microbatches are up to 12,000,000,000 ops, more than \
the 5,000,000 that can be worked out in minutes: lower one of them
    """
    num_ops = 3 * num_stages * num_microbatches
    if num_ops > _MAX_OPS:
        raise ConfigError(
            f"{num_stages} stages × {num_microbatches} microbatches are up to {num_ops:,} ops, more than the "
            f"{_MAX_OPS:,} that can be worked out in minutes: lower one of them"
        )
    if num_ranks * num_stages > _MAX_PLACES:
        raise ConfigError(
            f"{num_ranks} ranks × {num_stages} stages make more than {_MAX_PLACES:,}, which cannot be "
            "worked out in minutes: lower one of them"
        )


def one_stage_a_rank(name: str, num_ranks: int, stages_per_rank: int) -> Placement:
    """Return the linear placement, or raise `ConfigError` in that schedule's name for several stages a rank.

    >>> one_stage_a_rank("zb-h1", num_ranks=2, stages_per_rank=3)
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: schedule 'zb-h1' needs as many stages as ranks, got 6 stages on 2 ranks: \
the nearest count is 2 stages, with stages_per_rank=1
    """
    placement = Placement.looped(num_ranks, stages_per_rank)
    if stages_per_rank > 1:
        raise ConfigError(
            f"schedule {name!r} needs as many stages as ranks, got {placement.num_stages} stages on "
            f"{num_ranks} ranks: the nearest count is {num_ranks} stages, with stages_per_rank=1"
        )
    return placement


def v_placement(name: str, num_ranks: int, stages_per_rank: int) -> Placement:
    """Return the V-shaped placement, or raise `ConfigError` in that schedule's name for other than 2 stages.

    >>> v_placement("zb-v", num_ranks=2, stages_per_rank=3)
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: schedule 'zb-v' needs 2 stages a rank, one on each arm of its V, got 6 \
stages on 2 ranks: the nearest count is 4 stages, with stages_per_rank=2
    """
    num_stages = Placement.looped(num_ranks, stages_per_rank).num_stages
    if stages_per_rank != 2:
        raise ConfigError(
            f"schedule {name!r} needs 2 stages a rank, one on each arm of its V, got {num_stages} stages on "
            f"{num_ranks} ranks: the nearest count is {2 * num_ranks} stages, with stages_per_rank=2"
        )
    return Placement.v_shape(num_ranks)
