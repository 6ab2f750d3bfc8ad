"""The catalog: every schedule by its name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from evenflow.errors import ConfigError
from evenflow.ir.schedule import Schedule
from evenflow.schedules.forward_only import forward_only
from evenflow.schedules.gpipe import gpipe
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.schedules.sequential import sequential


class ScheduleFunction(Protocol):
    """What every method is: a pure function from sizes to a schedule.

    >>> method: ScheduleFunction = gpipe
    >>> method(num_ranks=2, stages_per_rank=1, num_microbatches=4).name
    'gpipe'
    """

    def __call__(self, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
        """Return the schedule of these sizes; `ConfigError` for sizes that it can't serve."""
        ...


SCHEDULES: Mapping[str, ScheduleFunction] = MappingProxyType(
    {
        "sequential": sequential,
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "forward-only": forward_only,
    }
)


def get(name: str) -> ScheduleFunction:
    """Return the schedule of that name; an unknown one raises `ConfigError` with all names and the nearest.

    >>> get("gpipe")(num_ranks=2, stages_per_rank=1, num_microbatches=4).name
    'gpipe'
    >>> get("gpip")
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: no schedule 'gpip'; did you mean 'gpipe'?
    There are: sequential, gpipe, 1f1b, forward-only
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    # A cutoff of 0 always yields the nearest name, however far it is.
    nearest = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.0)[0]
    raise ConfigError(f"no schedule {name!r}; did you mean {nearest!r}?\nThere are: {', '.join(SCHEDULES)}")
