"""Auto: the best schedule that a portfolio and a search find for given costs and memory caps.

The portfolio is the catalog, with the stages per rank that are asked for. From those of its schedules that
fit the memory, `evenflow.search` starts, with schedules of its own beside them; so the result is never longer
than any of them, and the bound (`evenflow.bounds`) says how far it can be from the best there is on its
placement. Where a schedule of the catalog meets the bound there is nothing to search.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, isfinite

from evenflow.bounds import Bound, Bounds, instance_of, lower_bounds
from evenflow.bounds_of import bounds_of
from evenflow.errors import ConfigError, EvenflowError, ScheduleError
from evenflow.ir.costs import ROUNDING, Costs
from evenflow.ir.flow import Flow
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Objective
from evenflow.memory import memory_faults
from evenflow.schedules.methods import AUTO, SCHEDULES, fitted
from evenflow.schedules.v_shape import v_queues
from evenflow.search.find import Progress, find
from evenflow.search.tables import Order
from evenflow.search.translate import order_of, schedule_of
from evenflow.simulate import simulate

DEFAULT_BUDGET_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Best:
    """A schedule, its span or makespan in seconds, and the bound on it for this placement and these costs.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> Best(gpipe(2, 1, 4), 15.0, Bound(12.0, "rank 0 has this much work")).gap
    0.25
    """

    schedule: Schedule
    seconds: float
    bound: Bound

    @property
    def gap(self) -> float:
        """The share by which it is longer than the bound: 0 means that it is optimal."""
        return self.seconds / self.bound.seconds - 1 if self.bound.seconds > 0 else 0.0


def best(
    num_ranks: int,
    stages_per_rank: int | None,
    num_microbatches: int,
    costs_on: Callable[[Placement], Costs],
    *,
    objective: Objective = "makespan",
    time_budget_seconds: float = DEFAULT_BUDGET_SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Best:
    """Return the best schedule found for these sizes, where `costs_on` says what a placement's stages cost.

    One stage a rank stands in line, two stand in a V or a loop, more in a loop; without `stages_per_rank` one
    and two are tried. The budget is shared by the placements, and the most promising comes first. For all
    else see `best_on`.

    Raises `ConfigError` for a count below 1, a budget that is not above 0 and an unknown objective, and
    `ScheduleError`, with the reason for each placement, where nothing fits the memory caps.

    >>> found = best(2, 2, 4, lambda placement: Costs.uniform(4))
    >>> found.schedule.name, found.seconds, found.gap
    ('zb-v', 25.0, 0.0)
    """
    _check(num_microbatches, objective, time_budget_seconds)
    counts = (1, 2) if stages_per_rank is None else (stages_per_rank,)
    priced: list[tuple[float, Placement, Costs]] = []
    faults: list[str] = []
    for placement in (placement for count in counts for placement in _placements(num_ranks, count)):
        costs = costs_on(placement)
        try:
            bounds = lower_bounds(instance_of(placement, num_microbatches, costs))
        except ScheduleError as error:
            faults.append(str(error))
            continue
        priced.append((_of(objective, bounds).seconds, placement, costs))
    found: list[Best] = []
    for _, placement, costs in sorted(priced, key=lambda each: each[0]):
        try:
            found.append(
                best_on(
                    placement,
                    num_microbatches,
                    costs,
                    objective=objective,
                    time_budget_seconds=time_budget_seconds / len(priced),
                    seed=seed,
                    progress=progress,
                    enough_seconds=min((each.seconds for each in found), default=inf),
                )
            )
        except ScheduleError as error:
            faults.append(str(error))
    if not found:
        raise ScheduleError("\n".join(dict.fromkeys(faults)))
    return min(found, key=lambda each: each.seconds)


def best_on(
    placement: Placement,
    num_microbatches: int,
    costs: Costs,
    *,
    objective: Objective = "makespan",
    time_budget_seconds: float = DEFAULT_BUDGET_SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
    enough_seconds: float = inf,
) -> Best:
    """Return the best schedule found for a chain of stages that are placed so.

    On one machine the same arguments give the same schedule: the budget is spent in steps that take about so
    long on a core of 2.5 GHz. `progress` is called with the name of each step and the best seconds so far.
    Where the catalog has a schedule that fits, nothing is searched if the bound says that it could not be
    shorter than that, or than `enough_seconds`.

    Raises `ConfigError` for a count below 1, a budget that is not above 0 and an unknown objective, and
    `ScheduleError` where nothing fits the memory caps.

    >>> found = best_on(Placement.linear(2), 4, Costs.uniform(2, latency_seconds=0.5), objective="span")
    >>> found.schedule.name, found.seconds, found.bound.seconds
    ('zb-auto', 12.0, 12.0)
    """
    _check(num_microbatches, objective, time_budget_seconds)
    flow = Flow.chain(placement.num_stages)
    instance = instance_of(placement, num_microbatches, costs)
    least = _of(objective, lower_bounds(instance))

    def seconds(schedule: Schedule) -> float:
        timeline = simulate(schedule, flow, costs)
        return timeline.span_seconds if objective == "span" else timeline.makespan_seconds

    fitting = list(_fitting(placement, num_microbatches, costs))
    known = [(seconds(schedule), schedule) for schedule in fitting]
    enough = min([enough_seconds, *(each for each, _ in known)]) if known else inf
    if enough > least.seconds * (1 + ROUNDING):

        def seeds(number: int) -> Iterator[Order]:
            again = fitting if number == num_microbatches else _fitting(placement, number, costs)
            return _seeds(again, placement, number, costs)

        found = find(
            instance,
            objective=objective,
            seeds=seeds,
            time_budget_seconds=time_budget_seconds,
            seed=seed,
            target=least.seconds,
            progress=progress,
        )
        schedule = schedule_of(found.order, placement, num_microbatches, AUTO)
        known.append((seconds(schedule), schedule))
    took, schedule = min(known, key=lambda pair: pair[0])
    bounds = bounds_of(schedule, costs)  # an overlap may do what no single ops can
    assert bounds is not None, "it trains"
    return Best(schedule, took, _of(objective, bounds))


def auto(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the schedule of least makespan for equal ops, free transfers and the memory of 1F1B.

    So a rank holds the activations of at most `num_ranks` microbatches. Two stages a rank stand in a V.

    Raises `ConfigError` for a count below 1.

    >>> auto(num_ranks=2, stages_per_rank=2, num_microbatches=4).name
    'zb-v'
    """
    placement = _placements(num_ranks, stages_per_rank)[0]
    each, caps = (1.0,) * num_ranks, (float(num_ranks),) * num_ranks
    costs = Costs.of_ranks(placement, each, each, each, memory_caps=caps)
    return best_on(placement, num_microbatches, costs, time_budget_seconds=5.0).schedule


def _check(num_microbatches: int, objective: str, time_budget_seconds: float) -> None:
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches must be at least 1, got {num_microbatches}")
    if objective not in {"span", "makespan"}:
        raise ConfigError(f"objective must be 'span' or 'makespan', got {objective!r}")
    if not (isfinite(time_budget_seconds) and time_budget_seconds > 0):
        raise ConfigError(f"time_budget_seconds must be finite and above 0, got {time_budget_seconds}")


def _of(objective: Objective, bounds: Bounds) -> Bound:
    return bounds.span if objective == "span" else bounds.makespan


def _placements(num_ranks: int, stages_per_rank: int) -> tuple[Placement, ...]:
    looped = Placement.looped(num_ranks, stages_per_rank)
    return (Placement.v_shape(num_ranks), looped) if stages_per_rank == 2 and num_ranks > 1 else (looped,)


def _fitting(placement: Placement, num_microbatches: int, costs: Costs) -> Iterator[Schedule]:
    """Yield the schedules of the catalog that are placed so and fit the memory."""
    for method in SCHEDULES.values():
        try:
            made = fitted(
                method,
                num_ranks=placement.num_ranks,
                stages_per_rank=placement.num_stages // placement.num_ranks,
                num_microbatches=num_microbatches,
                costs_on=lambda _: costs,
            )
        except EvenflowError:
            continue  # it can't serve these sizes
        if made.trains and made.placement == placement and not memory_faults(made, costs):
            yield made


def _seeds(
    fitting: Iterable[Schedule], placement: Placement, num_microbatches: int, costs: Costs
) -> Iterator[Order]:
    for schedule in fitting:
        yield order_of(schedule)
    if placement.num_ranks > 1 and placement == Placement.v_shape(placement.num_ranks):
        # What lies between v-min, v-half and zb-v.
        caps = costs.memory_caps or (inf,)
        stored = max(costs.activation_bytes)
        limit = min(min(caps) / stored * (1 + ROUNDING) if stored else inf, 2 * num_microbatches)
        if limit >= 2:
            queues = v_queues(placement, num_microbatches, limit=int(limit))
            yield order_of(Schedule("v", placement, num_microbatches, queues))
