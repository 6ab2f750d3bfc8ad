"""The catalog: every schedule by its name, and `auto`, which searches for the best."""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from evenflow.errors import ConfigError
from evenflow.foreign import shown
from evenflow.ir.costs import Costs
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.schedules.dualpipe_v import dualpipe_v
from evenflow.schedules.eager_1f1b import eager_1f1b
from evenflow.schedules.forward_only import forward_only
from evenflow.schedules.gpipe import gpipe
from evenflow.schedules.interleaved_1f1b import interleaved_1f1b
from evenflow.schedules.interleaved_zb import interleaved_zb
from evenflow.schedules.looped_bfs import looped_bfs
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.schedules.sequential import sequential
from evenflow.schedules.v_half import v_half
from evenflow.schedules.v_min import v_min
from evenflow.schedules.zb_auto import zb_auto
from evenflow.schedules.zb_h1 import zb_h1
from evenflow.schedules.zb_h2 import zb_h2
from evenflow.schedules.zb_v import zb_v


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
        "eager-1f1b": eager_1f1b,
        "interleaved-1f1b": interleaved_1f1b,
        "looped-bfs": looped_bfs,
        "zb-h1": zb_h1,
        "zb-h2": zb_h2,
        "zb-auto": zb_auto,
        "interleaved-zb": interleaved_zb,
        "zb-v": zb_v,
        "v-half": v_half,
        "v-min": v_min,
        "dualpipe-v": dualpipe_v,
        "forward-only": forward_only,
    }
)

AUTO = "auto"  # not one order but the best of all, and of a search: see `auto`
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
    method = get(name)
    if method is zb_auto:
        costs = costs_on(Placement.linear(num_ranks)) if num_ranks > 0 else None
        return zb_auto(num_ranks, stages_per_rank, num_microbatches, costs)
    return method(num_ranks, stages_per_rank, num_microbatches)
