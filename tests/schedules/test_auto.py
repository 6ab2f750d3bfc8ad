"""`auto` runs, fits, is never longer than the catalog nor shorter than its bound, and says no in words."""

import math
import random

import pytest

from evenflow.bounds_of import bounds_of
from evenflow.errors import ConfigError, EvenflowError, ScheduleError
from evenflow.ir import Costs, Flow, Link, Placement, Schedule
from evenflow.lower import lower
from evenflow.memory import memory_faults, peak_bytes
from evenflow.schedules import catalog
from evenflow.schedules.auto import Best, auto, best, best_on
from evenflow.simulate import simulate
from evenflow.validate import prove

BUDGET_SECONDS = 0.1


def seconds(schedule: Schedule, costs: Costs, objective) -> float:
    timeline = simulate(schedule, Flow.chain(schedule.placement.num_stages), costs)
    return timeline.span_seconds if objective == "span" else timeline.makespan_seconds


def check(found: Best, costs: Costs, objective) -> None:
    """It can run, fits, takes as long as it says, and no less than its bound."""
    flow = Flow.chain(found.schedule.placement.num_stages)
    assert prove(lower(found.schedule, flow), costs).program.schedule is found.schedule
    assert found.schedule.trains
    assert memory_faults(found.schedule, costs) == []
    assert found.seconds == seconds(found.schedule, costs, objective)
    bounds = bounds_of(found.schedule, costs)
    assert found.bound == (bounds.span if objective == "span" else bounds.makespan)
    assert found.seconds >= found.bound.seconds * (1 - 1e-9)
    assert found.gap == pytest.approx(found.seconds / found.bound.seconds - 1)


class Machine:
    """Random sizes and unequal costs: of a stage, wherever it is placed, and of the rank that holds it."""

    def __init__(self, seed: int) -> None:
        chosen = random.Random(seed)
        self.num_ranks, self.stages_per_rank = chosen.randint(2, 5), chosen.choice([1, 2])
        self.num_microbatches = chosen.randint(2, 10)
        num = self.num_ranks * self.stages_per_rank

        def unequal(count: int) -> list[float]:
            return [chosen.lognormvariate(0.0, 0.4) for _ in range(count)]

        self.seconds, self.speed = [unequal(num) for _ in "FIW"], unequal(self.num_ranks)
        self.held, self.kept = unequal(num), [chosen.choice([0.5, 1.0]) for _ in range(num)]
        self.room = [chosen.uniform(1.0, 1.5 * self.num_ranks) for _ in range(self.num_ranks)]
        self.link = Link(chosen.choice([0.0, 0.1, 0.5]), chosen.choice([math.inf, 10.0]))
        self.sent = unequal(num)

    def costs_on(self, placement: Placement) -> Costs:
        rank_of, num = placement.rank_of, placement.num_stages
        whole = [
            sum(self.held[stage] for stage in placement.stages_on(rank)) for rank in range(self.num_ranks)
        ]
        return Costs(
            *(
                tuple(each * self.speed[rank] for each, rank in zip(kind, rank_of, strict=True))
                for kind in self.seconds
            ),
            link=self.link,
            sent_bytes={
                edge: self.sent[stage]
                for stage in range(num - 1)
                for edge in [(stage, stage + 1), (stage + 1, stage)]
            },
            activation_bytes=tuple(self.held),
            weight_grad_bytes=tuple(share * each for share, each in zip(self.kept, self.held, strict=True)),
            memory_caps=tuple(room * size for room, size in zip(self.room, whole, strict=True)),
        )

    def catalog(self) -> list[Schedule]:
        """All schedules of these sizes that train and fit."""
        made = []
        linear = self.costs_on(Placement.looped(self.num_ranks, self.stages_per_rank))
        for name in catalog.SCHEDULES:
            try:
                schedule = catalog.make(
                    name,
                    num_ranks=self.num_ranks,
                    stages_per_rank=self.stages_per_rank,
                    num_microbatches=self.num_microbatches,
                    costs_on=lambda _: linear,  # asked for one stage a rank alone
                )
            except EvenflowError:
                continue
            if schedule.trains and not memory_faults(schedule, self.costs_on(schedule.placement)):
                made.append(schedule)
        return made

    def best(self, objective, budget: float = BUDGET_SECONDS, seed: int = 0) -> Best:
        return best(
            self.num_ranks,
            self.stages_per_rank,
            self.num_microbatches,
            self.costs_on,
            objective=objective,
            time_budget_seconds=budget,
            seed=seed,
        )


both = pytest.mark.parametrize("objective", ["span", "makespan"])


@both
@pytest.mark.parametrize("seed", range(12))
def test_it_is_at_least_as_good_as_all_that_fits(seed: int, objective) -> None:
    machine = Machine(seed)
    found = machine.best(objective)
    check(found, machine.costs_on(found.schedule.placement), objective)
    placements = [Placement.looped(machine.num_ranks, machine.stages_per_rank)]
    placements += [Placement.v_shape(machine.num_ranks)] * (machine.stages_per_rank == 2)
    assert found.schedule.placement in placements
    for schedule in machine.catalog():
        assert schedule.placement in placements
        assert found.seconds <= seconds(schedule, machine.costs_on(schedule.placement), objective)


def test_on_unequal_stages_it_mostly_beats_the_catalog_and_comes_near_its_bound() -> None:
    shorter, gaps = 0, []
    for seed in range(12):
        machine = Machine(seed)
        found = machine.best("makespan", 0.05)
        known = [seconds(each, machine.costs_on(each.placement), "makespan") for each in machine.catalog()]
        shorter += found.schedule.name == "auto" and found.seconds < 0.99 * min(known)
        gaps.append(found.gap)
    assert shorter >= 8
    assert sorted(gaps)[6] < 0.05


def test_the_same_arguments_give_the_same_schedule() -> None:
    machine = Machine(4)
    found = [machine.best("makespan", 0.02, seed) for seed in (3, 3, 4, 5)]
    assert found[0] == found[1]
    for each in found:
        check(each, machine.costs_on(each.schedule.placement), "makespan")
    assert len({each.schedule for each in found}) > 1


@pytest.mark.parametrize("cheap", [Placement.v_shape(3), Placement.looped(3, 2)])
def test_of_two_placements_the_better_is_taken(cheap: Placement) -> None:
    def costs_on(placement: Placement) -> Costs:
        each = 1.0 if placement == cheap else 1.5
        return Costs.uniform(6, each, each, each, latency_seconds=0.1)

    found = best(3, 2, 4, costs_on, time_budget_seconds=0.02)
    assert found.schedule.placement == cheap


def test_a_placement_that_fits_no_memory_is_passed_over() -> None:
    def costs_on(placement: Placement) -> Costs:
        held = (3.0, 2.0, 3.0, 2.0)  # the loop puts both large stages on rank 0, the V only one
        return Costs(*[(1.0,) * 4] * 3, activation_bytes=held, memory_caps=(5.0, 5.0))

    found = best(2, 2, 3, costs_on, time_budget_seconds=0.02)
    assert found.schedule.placement == Placement.v_shape(2)
    check(found, costs_on(found.schedule.placement), "makespan")


@both
def test_no_search_is_needed_where_the_catalog_reaches_the_bound(objective) -> None:
    told = []
    found = best(
        4,
        2,
        8,
        lambda placement: Costs.uniform(8),
        objective=objective,
        progress=lambda *step: told.append(step),
    )
    assert (found.schedule.name, found.gap, told) == ("zb-v", 0.0, [])


def test_the_progress_is_told() -> None:
    placement, told = Placement.linear(3), []
    costs = Costs((1.0, 1.5, 1.1), (1.3, 1.0, 1.2), (0.9, 1.0, 0.7), memory_caps=(2.0, 2.0, 2.0))
    found = best_on(
        placement,
        6,
        costs,
        time_budget_seconds=0.02,
        progress=lambda step, value: told.append((step, value)),
    )
    assert len({step for step, _ in told}) > 3
    values = [value for _, value in told]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(found.seconds)


# --- units, zeros and ones -------------------------------------------------------------------------------


@both
def test_the_units_of_a_real_machine_will_do(objective) -> None:
    def costs_on(placement: Placement) -> Costs:
        num = placement.num_stages
        edges = [edge for at in range(num - 1) for edge in [(at, at + 1), (at + 1, at)]]
        return Costs(
            *(tuple(scale * (1 + stage % 3) for stage in range(num)) for scale in (1e-3, 1.1e-3, 0.9e-3)),
            link=Link(latency_seconds=5e-6, bytes_per_second=2.5e10),
            sent_bytes=dict.fromkeys(edges, 3.3e7),
            activation_bytes=tuple(1.7e9 + 1e8 * stage for stage in range(num)),
            weight_grad_bytes=(1.1e9,) * num,
            memory_caps=(8e9, 9e9, 1e10),
        )

    found = best(3, 2, 6, costs_on, objective=objective, time_budget_seconds=0.1)
    check(found, costs_on(found.schedule.placement), objective)
    assert 6 * 12e-3 <= found.seconds < 0.15
    assert found.gap < 0.2


@both
@pytest.mark.parametrize("latency", [0.0, 1.0])
@pytest.mark.parametrize("caps", [None, (2.0, 3.0, 2.0)])
@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_ops_that_take_no_time(objective, latency: float, caps, stages_per_rank: int) -> None:
    def costs_on(placement: Placement) -> Costs:
        none = (0.0,) * placement.num_stages
        return Costs(none, none, none, link=Link(latency), memory_caps=caps)

    found = best(3, stages_per_rank, 5, costs_on, objective=objective, time_budget_seconds=0.02)
    assert memory_faults(found.schedule, costs_on(found.schedule.placement)) == []
    if latency == 0:
        assert (found.seconds, found.gap) == (0.0, 0.0)


@pytest.mark.parametrize("caps", [None, (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_stages_that_hold_nothing(caps, stages_per_rank: int) -> None:
    num = 3 * stages_per_rank

    def costs_on(placement: Placement) -> Costs:
        each = tuple(1.0 + 0.3 * (stage % 4) for stage in range(num))
        return Costs(each, each, each, link=Link(0.3), activation_bytes=(0.0,) * num, memory_caps=caps)

    found = best(3, stages_per_rank, 4, costs_on, time_budget_seconds=0.05)
    check(found, costs_on(found.schedule.placement), "makespan")


@both
@pytest.mark.parametrize(
    ("num_ranks", "stages_per_rank", "num_microbatches"), [(1, 1, 3), (1, 2, 4), (1, 3, 1)]
)
def test_one_rank_is_never_idle(num_ranks, stages_per_rank, num_microbatches, objective) -> None:
    each = tuple(1.0 + stage for stage in range(stages_per_rank))
    costs = Costs(each, each, each, memory_caps=(float(stages_per_rank),))
    found = best(1, stages_per_rank, num_microbatches, lambda _: costs, objective=objective)
    check(found, costs, objective)
    assert found.seconds == 3 * sum(each) * num_microbatches


@both
@pytest.mark.parametrize("stages_per_rank", [1, 2, 3])
def test_one_microbatch_goes_there_and_back(stages_per_rank: int, objective) -> None:
    num = 3 * stages_per_rank

    def costs_on(placement: Placement) -> Costs:
        return Costs((1.0,) * num, (2.0,) * num, (0.5,) * num, link=Link(0.25))

    found = best(3, stages_per_rank, 1, costs_on, objective=objective, time_budget_seconds=0.05)
    check(found, costs_on(found.schedule.placement), objective)
    assert found.gap == pytest.approx(0.0)


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 4), "num_ranks must be at least 1, got 0"),
        ((2, 0, 4), "stages_per_rank must be at least 1, got 0"),
        ((2, 1, 0), "num_microbatches must be at least 1, got 0"),
        ((2, 2, -1), "num_microbatches must be at least 1, got -1"),
    ],
)
def test_a_count_below_1_is_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        best(*sizes, lambda placement: Costs.uniform(placement.num_stages))
    with pytest.raises(ConfigError, match=message):
        auto(*sizes)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_no_time_is_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match=rf"time_budget_seconds must be finite and above 0, got {budget}"):
        best_on(Placement.linear(2), 4, Costs.uniform(2), time_budget_seconds=budget)


@pytest.mark.parametrize("stages_per_rank", [1, 2])
def test_a_rank_that_holds_no_microbatch_is_named(stages_per_rank: int) -> None:
    def costs_on(placement: Placement) -> Costs:
        return Costs.of_ranks(placement, *[(1.0,) * 3] * 3, memory_caps=(4.0, 1.0, 0.5))

    with pytest.raises(ScheduleError, match=r"rank 2 has a cap of 0\.5 and needs 1\.0 for one"):
        best(3, stages_per_rank, 4, costs_on)


# --- as a schedule of the catalog ------------------------------------------------------------------------

SIZES = [(1, 1, 3), (1, 2, 2), (2, 1, 1), (2, 1, 4), (3, 1, 8), (3, 2, 1), (3, 2, 4), (4, 2, 9), (2, 3, 1)]


@pytest.mark.parametrize(("num_ranks", "stages_per_rank", "num_microbatches"), SIZES)
def test_by_its_name_it_takes_sizes_alone(num_ranks, stages_per_rank, num_microbatches) -> None:
    schedule = catalog.get("auto")(num_ranks, stages_per_rank, num_microbatches)
    assert schedule.num_microbatches == num_microbatches
    v_shape = stages_per_rank == 2 and num_ranks > 1
    placement = Placement.v_shape(num_ranks) if v_shape else Placement.looped(num_ranks, stages_per_rank)
    assert schedule.placement == placement, "whatever the number of microbatches"
    assert prove(lower(schedule, Flow.chain(placement.num_stages))).program.schedule is schedule
    assert schedule.trains
    each = (1.0,) * num_ranks
    assert max(peak_bytes(schedule, Costs.of_ranks(placement, each, each, each))) <= num_ranks + 1e-9


def test_its_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="no schedule 'auot'; did you mean 'auto'"):
        catalog.get("auot")
    assert catalog.default_stages_per_rank("auto") == 2


def test_without_a_count_it_looks_at_one_and_two_stages_a_rank() -> None:
    # Where transfers take ten ops, two stages a rank pay for them twice.
    def costs_on(placement: Placement) -> Costs:
        each = (1.0,) * 4
        return Costs.of_ranks(placement, each, each, each, latency_seconds=10.0, memory_caps=(8.0,) * 4)

    free = best(4, None, 8, costs_on, time_budget_seconds=BUDGET_SECONDS)
    one, two = (best(4, count, 8, costs_on, time_budget_seconds=BUDGET_SECONDS) for count in (1, 2))
    assert free.schedule.placement == Placement.linear(4)
    assert free.seconds == one.seconds < two.seconds


def test_the_catalog_makes_it_for_costs_and_caps() -> None:
    def costs_on(placement: Placement) -> Costs:
        return Costs.of_ranks(placement, (1.0, 9.0), (1.0, 9.0), (1.0, 9.0), memory_caps=(1.0, 1.0))

    made = catalog.make("auto", num_ranks=2, stages_per_rank=1, num_microbatches=1, costs_on=costs_on)
    assert memory_faults(made, costs_on(made.placement)) == []
    with pytest.raises(ScheduleError, match="cap"):
        catalog.make("auto", num_ranks=2, stages_per_rank=1, num_microbatches=1, costs_on=tight)


def tight(placement: Placement) -> Costs:
    return Costs.of_ranks(placement, (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, memory_caps=(0.5, 0.5))


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective must be 'span' or 'makespan', got 'bogus'"):
        best_on(Placement.linear(2), 4, Costs.uniform(2), objective="bogus")  # type: ignore[arg-type]
