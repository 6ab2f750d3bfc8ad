"""The catalog: every schedule by its name, and `auto`, which searches for the best."""

import difflib
from collections.abc import Callable

from evenflow.errors import ConfigError
from evenflow.foreign import shown
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.schedules.methods import AUTO, SCHEDULES, ScheduleFunction, fitted

__all__ = [
    "AUTO",
    "NAMES",
    "SCHEDULES",
    "ScheduleFunction",
    "default_stages_per_rank",
    "get",
    "make",
]

NAMES = (*SCHEDULES, AUTO)

# The methods that are at their best with two stages a rank, or take no other number; the others with one.
_ON_TWO_STAGES = frozenset(
    {"interleaved-1f1b", "looped-bfs", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v", AUTO}
)


def get(name: str) -> ScheduleFunction:
    """Return the schedule of that name; an unknown one raises `ConfigError` with all names and the nearest.

    >>> get("gpipe")(num_ranks=2, stages_per_rank=1, num_microbatches=4).name
    'gpipe'
    >>> get("gpip")
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: no schedule 'gpip'; did you mean 'gpipe'?
    There are: sequential, gpipe, 1f1b, eager-1f1b, interleaved-1f1b, looped-bfs, zb-h1, zb-h2, zb-auto, \
interleaved-zb, zb-v, v-half, v-min, dualpipe-v, forward-only, auto
    """
    if name == AUTO:
        # Its search loads a compiler, which takes longer than all else here.
        from evenflow.schedules.auto import auto

        return auto
    if name in SCHEDULES:
        return SCHEDULES[name]
    # A cutoff of 0 always yields the nearest name, however far it is.
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.0)[0]
    raise ConfigError(f"no schedule {shown(name)}; did you mean {nearest!r}?\nThere are: {', '.join(NAMES)}")


def default_stages_per_rank(name: str) -> int:
    """Return how many stages a rank gets with the schedule of that name, where nobody says.

    >>> default_stages_per_rank("interleaved-1f1b"), default_stages_per_rank("1f1b")
    (2, 1)
    """
    return 2 if name in _ON_TWO_STAGES else 1


def make(
    name: str,
    *,
    num_ranks: int,
    stages_per_rank: int,
    num_microbatches: int,
    costs_on: Callable[[Placement], Costs],
) -> Schedule:
    """Return the schedule of that name and these sizes, fitted to the costs where the method can be.

    `costs_on` says what the stages cost where they are placed so. Raises `ConfigError` for an unknown name,
    and for sizes or costs that the method can't serve.

    >>> make(
    ...     "zb-auto",
    ...     num_ranks=2,
    ...     stages_per_rank=1,
    ...     num_microbatches=4,
    ...     costs_on=lambda placement: Costs.of_ranks(placement, (1, 2), (1, 2), (1, 2), memory_caps=(2, 2)),
    ... ).num_microbatches
    4
    """
    if name == AUTO:
        from evenflow.schedules.auto import best

        return best(num_ranks, stages_per_rank, num_microbatches, costs_on).schedule
    return fitted(
        get(name),
        num_ranks=num_ranks,
        stages_per_rank=stages_per_rank,
        num_microbatches=num_microbatches,
        costs_on=costs_on,
    )
