"""The methods: every schedule that is a pure function of sizes, by its name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

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

AUTO = "auto"  # what is no method: the best of all of them, and of a search (`schedules.auto`)


def fitted(
    method: ScheduleFunction,
    *,
    num_ranks: int,
    stages_per_rank: int,
    num_microbatches: int,
    costs_on: Callable[[Placement], Costs],
) -> Schedule:
    """Return the schedule of that method, fitted to the costs where it can be; see `catalog.make`."""
    if method is zb_auto:
        costs = costs_on(Placement.linear(num_ranks)) if num_ranks > 0 else None
        return zb_auto(num_ranks, stages_per_rank, num_microbatches, costs)
    return method(num_ranks, stages_per_rank, num_microbatches)
