"""A schedule searched for the very stages of a plan, where those of the catalog leave them idle.

A method of the catalog knows sizes alone. Here the stages are known, what each takes and how long transfers
are on their way, and what memory is left for activations. Backwards are whole in one search, and in two parts
in another; in none of them both, as parting only pays where ranks wait.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import add

from evenflow.bounds import instance_of, lower_bounds
from evenflow.errors import ScheduleError
from evenflow.ir.costs import Costs
from evenflow.ir.op import Backward, ComputeOp, InputGrad, WeightGrad, parts
from evenflow.ir.schedule import Schedule
from evenflow.memory import peak_bytes
from evenflow.plan.request import Request
from evenflow.plan.search.fit import Fit, at_cuts
from evenflow.plan.search.price import Priced, priced_fit
from evenflow.schedules import catalog

_WORTH = 0.98  # of the seconds of a step with a method of the catalog: more is left to that, as it is known
_MOST_OPS = 4_000  # of orders that are searched: longer ones are hardly better after so short a search
_MOST_SEARCHES = 3


def searched(request: Request, found: Sequence[Priced], *, budget_seconds: float) -> Priced | None:
    """The best of some choices with an order of its own; None where that is hardly faster than they are.

    `found` is not empty, and its first is the fastest. The budget is spent in steps, so that the same
    arguments give the same order on one machine. Nothing is searched where the user or the limits decide the
    schedule, on one rank, and where the bound for these stages says that too little can be gained.
    """
    if request.levers.schedule is not None or request.limits is not None or budget_seconds <= 0:
        return None
    best, enough_seconds = None, found[0].step_seconds * _WORTH
    attempts = sorted(_attempts(request, found), key=lambda each: each.least_seconds)
    open_ones = [each for each in attempts if each.least_seconds < enough_seconds][:_MOST_SEARCHES]
    for attempt in open_ones:
        made = attempt.run(request, enough_seconds, budget_seconds / len(open_ones))
        if made is not None and made.step_seconds < enough_seconds:
            best, enough_seconds = made, made.step_seconds
    return best


@dataclass(frozen=True, slots=True)
class _Attempt:
    """To search for a choice, cut as it is, with backwards of one way.

    `costs` are as the search takes them: a whole backward is an input gradient that leaves nothing to do.
    """

    start: Priced
    costs: Costs
    in_two: bool
    least_seconds: float  # of a step, whatever the order

    def run(self, request: Request, enough_seconds: float, budget_seconds: float) -> Priced | None:
        """What is found, if it fits."""
        from evenflow.schedules.auto import best_on  # its compiler is slow to load

        start = self.start
        try:
            order = best_on(
                start.fit.schedule.placement,
                start.choice.num_microbatches,
                self.costs,
                time_budget_seconds=budget_seconds,
                enough_seconds=enough_seconds - _other_seconds(start),
            ).schedule
        except ScheduleError:  # nothing fits, as far as this search saw
            return None
        order = replace(_with_backwards(order, in_two=self.in_two), name=catalog.AUTO)
        choice = replace(start.choice, schedule=catalog.AUTO)
        cut = start.fit
        fit = at_cuts(request, choice, cut.chain, cut.positions, cut.groups, schedule=order)
        return priced_fit(request, choice, fit) if max(fit.over_bytes) <= 0 else None


def _attempts(request: Request, found: Sequence[Priced]) -> Iterator[_Attempt]:
    """What may be searched for: each cut of a few ops once, with either kind of backwards."""
    seen = set()
    for start in found:
        cut, number = start.fit, start.choice.num_microbatches
        placement = cut.schedule.placement
        key = start.choice.degrees, placement, number, cut.positions, cut.again
        is_long = 3 * placement.num_stages * number > _MOST_OPS
        if placement.num_ranks == 1 or is_long or key in seen:
            continue
        seen.add(key)
        for in_two in (False, True):
            schedule = _with_backwards(cut.schedule, in_two=in_two)
            fit = at_cuts(request, start.choice, cut.chain, cut.positions, cut.groups, schedule=schedule)
            costs = _searchable(fit, in_two=in_two)
            try:
                bounds = lower_bounds(instance_of(placement, number, costs))
            except ScheduleError:  # not even one microbatch fits
                continue
            yield _Attempt(start, costs, in_two, bounds.makespan.seconds + _other_seconds(start))


def _searchable(fit: Fit, *, in_two: bool) -> Costs:
    """The costs of a fit, with the memory that each rank has left for activations."""
    # More than this schedule's: as much as lies below the cap at the rank's peak, whatever is there then.
    caps = tuple(
        max(0.0, group.cap_bytes - need.allocated + peak)
        for group, need, peak in zip(fit.groups, fit.memory, peak_bytes(fit.schedule, fit.costs), strict=True)
    )
    costs = replace(fit.costs, memory_caps=caps)
    if in_two:
        return costs
    nothing = (0.0,) * costs.num_stages
    whole = map(add, costs.input_grad_seconds, costs.weight_grad_seconds)
    return replace(
        costs, input_grad_seconds=tuple(whole), weight_grad_seconds=nothing, weight_grad_bytes=nothing
    )


def _other_seconds(priced: Priced) -> float:
    """What of a step is not the pipeline's."""
    return priced.step_seconds - priced.pipeline_seconds


def _with_backwards(schedule: Schedule, *, in_two: bool) -> Schedule:
    """The schedule with every backward in two parts, which follow each other where it was whole; or whole."""

    def alike(op: ComputeOp) -> Iterator[ComputeOp]:
        for part in parts(op):
            match part:
                case Backward(stage, microbatch) if in_two:
                    yield InputGrad(stage, microbatch)
                    yield WeightGrad(stage, microbatch)
                case InputGrad(stage, microbatch) if not in_two:
                    yield Backward(stage, microbatch)
                case WeightGrad() if not in_two:
                    pass
                case _:
                    yield part

    queues = tuple(tuple(new for op in queue for new in alike(op)) for queue in schedule.ranks)
    return replace(schedule, ranks=queues)
