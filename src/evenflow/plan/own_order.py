"""The order of work of a plan: one of the catalog, or one that it brings itself, where it was searched."""

from dataclasses import dataclass, replace

from evenflow.errors import ConfigError
from evenflow.foreign import shown
from evenflow.ir.op import ComputeOp, parts
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.plan.plan import Plan
from evenflow.schedule_file import parse_schedule
from evenflow.schedules import catalog
from evenflow.schedules.sizes import check_workable


def own_schedule(plan: Plan) -> Schedule | None:
    """The schedule that a plan's own `order` is; None where `schedule` names one of the catalog.

    Raises `ConfigError` for a plan that has both or neither, for what is no op or stands on the wrong rank,
    and for another number of microbatches than the plan's. Whether the ops are complete is judged where they
    are run.
    """
    if (plan.schedule == catalog.AUTO) != bool(plan.order):
        raise ConfigError(
            f"the plan brings an order of its own, and schedule = {plan.schedule!r}: write schedule = "
            "'auto', or leave the order out"
            if plan.order
            else "schedule = 'auto' needs an order, and the plan has none: name a schedule, or plan again"
        )
    if not plan.order:
        return None
    placement = ",".join(str(stage.rank) for stage in plan.stages)
    try:
        made = parse_schedule("\n".join((*plan.order, f"# placement: {placement}")), name=plan.schedule)
    except ConfigError as error:
        raise ConfigError(
            "the plan's order cannot be read (line 1 is the row of rank 0; the placement is that of "
            f"[[stages]]): {error}"
        ) from None
    if made.num_microbatches != plan.num_microbatches:
        raise ConfigError(
            f"the plan's order has {made.num_microbatches} microbatches, and num_microbatches = "
            f"{plan.num_microbatches}"
        )
    return made


def check_stage_ranks(plan: Plan, placement: Placement) -> None:
    """Raise `ConfigError` for a plan whose stages stand elsewhere than its schedule puts them."""
    planned = tuple(stage.rank for stage in plan.stages)
    if planned != placement.rank_of:
        raise ConfigError(
            f"the plan's stages are on ranks {shown(planned)}, and its schedule {plan.schedule!r} "
            f"puts them on {shown(placement.rank_of)}: write these"
        )


def planned_schedule(plan: Plan) -> Schedule:
    """The schedule of a plan: its own order, or that of the catalog.

    Raises `ConfigError` as `own_schedule` and `check_workable`, and for a schedule that cannot serve the
    plan's sizes or puts stages elsewhere.
    """
    num_ranks = plan.degrees.pipeline
    check_workable(num_ranks, num_ranks * plan.stages_per_rank, plan.num_microbatches)
    made = own_schedule(plan)
    if made is None:
        made = catalog.get(plan.schedule)(num_ranks, plan.stages_per_rank, plan.num_microbatches)
    check_stage_ranks(plan, made.placement)
    return made


@dataclass(frozen=True, slots=True)
class OwnOrder:
    """A schedule function (`schedules.catalog`) of one schedule's sizes, and of any number of microbatches.

    Of other numbers the order runs again and again, without the microbatches that are not there: each rank
    does so in the same order as before, so that none waits in vain, and none holds more.
    """

    schedule: Schedule

    def __call__(self, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
        """Return the schedule; `ConfigError` for other ranks or stages than it has.

        >>> from evenflow.schedules.gpipe import gpipe
        >>> own = OwnOrder(gpipe(num_ranks=1, stages_per_rank=1, num_microbatches=2))
        >>> print(*own(num_ranks=1, stages_per_rank=1, num_microbatches=3).ranks[0])
        0F0 0F1 0B0 0B1 0F2 0B2
        """
        own = self.schedule
        sizes = own.placement.num_ranks, own.placement.num_stages
        if sizes != (num_ranks, num_ranks * stages_per_rank):
            raise ConfigError(
                f"an order of {sizes[1]} stages on {sizes[0]} ranks cannot serve {num_ranks} ranks of "
                f"{stages_per_rank} stages"
            )
        if num_microbatches == own.num_microbatches:
            return own
        ranks = tuple(self._repeated(queue, num_microbatches) for queue in own.ranks)
        return replace(own, num_microbatches=num_microbatches, ranks=ranks)

    def _repeated(self, queue: tuple[ComputeOp, ...], num_microbatches: int) -> tuple[ComputeOp, ...]:
        firsts = range(0, num_microbatches, self.schedule.num_microbatches)
        singles = [part for op in queue for part in parts(op)]
        return tuple(
            replace(op, microbatch=first + op.microbatch)
            for first in firsts
            for op in singles
            if first + op.microbatch < num_microbatches
        )
