"""The search finds what fits, the best of small problems, and the same again; never worse than its seeds."""

import math
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from random_problems import STRICT, Case, cost_of, equal, random_order

from brute_force import is_complete, peaks
from evenflow.bounds import instance_of
from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Costs, Link, Placement
from evenflow.schedules.catalog import get
from evenflow.search.find import OPS_PER_SECOND, Found, few_microbatches, find
from evenflow.search.tables import Order
from evenflow.search.translate import order_of
from evenflow.simulate import simulate
from exact_schedules import optimum

PLACEMENTS = {
    "linear": Placement.linear(3),
    "looped": Placement.looped(2, 2),
    "vee": Placement.v_shape(2),
    "any": Placement((1, 0, 0, 2)),
}


def drawn(placement: Placement, num_microbatches: int, *, seed: int) -> Case:
    """Unequal costs in whole numbers, with caps between one microbatch and most of them."""
    chosen = random.Random(f"{placement.rank_of} {num_microbatches} {seed}")

    def numbers(low: int, high: int) -> tuple[float, ...]:
        return tuple(float(chosen.randint(low, high)) for _ in placement.rank_of)

    held, most = numbers(1, 3), min(num_microbatches - 1, 3)
    whole = [sum(held[stage] for stage in placement.stages_on(rank)) for rank in range(placement.num_ranks)]
    costs = Costs(
        numbers(1, 4),
        numbers(1, 4),
        numbers(0, 4),
        link=Link(float(chosen.randint(0, 2))),
        activation_bytes=held,
        weight_grad_bytes=tuple(float(chosen.randint(0, int(each))) for each in held),
        memory_caps=tuple(size + chosen.randint(0, int(size) * most) for size in whole),
    )
    return Case(placement, costs, num_microbatches)


def check(case: Case, found: Found, objective) -> None:
    """Complete, within the caps, and as long as the simulator says."""
    schedule = case.schedule(found.order)
    assert is_complete(schedule)
    caps = case.costs.memory_caps
    assert all(peak <= cap for peak, cap in zip(peaks(schedule, case.costs), caps, strict=True))
    timeline = simulate(schedule, case.flow, case.costs)
    seconds = timeline.span_seconds if objective == "span" else timeline.makespan_seconds
    assert found.value == pytest.approx(seconds, rel=1e-12)


both = pytest.mark.parametrize("objective", ["span", "makespan"])


@both
@pytest.mark.parametrize("name", PLACEMENTS)
def test_of_small_problems_the_best_is_found(name: str, objective) -> None:
    placement = PLACEMENTS[name]
    for number in (2, 3, 4) if placement.num_stages == 3 else (1, 2, 3):
        case = drawn(placement, number, seed=number)
        best = optimum(case.instance, objective, limit_seconds=10)
        assert best is not None, "chosen small enough for the exact solver"
        found = find(case.instance, objective=objective, time_budget_seconds=0.02)
        check(case, found, objective)
        assert found.value == pytest.approx(best)
        enough = find(case.instance, objective=objective, time_budget_seconds=0.2, target=float(best))
        assert enough.value == pytest.approx(best)
        assert enough.num_ops < 0.2 * 0.5 * OPS_PER_SECOND, "it ends when the target is reached"


# Few enough to be searched as they are; with a search for fewer beside it; by a search for fewer alone.
SIZES = pytest.mark.parametrize("num_microbatches", [4, 8, 13])


@both
@SIZES
def test_what_is_found_fits_and_the_budget_is_kept(num_microbatches: int, objective) -> None:
    case = drawn(Placement.v_shape(2), num_microbatches, seed=3)
    told: list[tuple[str, float]] = []
    found = find(
        case.instance,
        objective=objective,
        time_budget_seconds=0.1,
        progress=lambda step, seconds: told.append((step, seconds)),
    )
    check(case, found, objective)
    assert found.num_ops == pytest.approx(0.1 * OPS_PER_SECOND, rel=0.03)
    values = [seconds for _, seconds in told]
    assert values == sorted(values, reverse=True)
    assert values[-1] == found.value
    for few in (4, 5):
        first = few in few_microbatches(case.placement.num_ranks, num_microbatches)
        assert any(f"{few} microbatches" in step for step, _ in told) == first == (num_microbatches > 4)


@both
@pytest.mark.parametrize(("stages_per_rank", "num_microbatches"), [(1, 5), (1, 20), (2, 6), (2, 16)])
def test_it_is_never_worse_than_its_seeds(stages_per_rank: int, num_microbatches: int, objective) -> None:
    placement = Placement.looped(3, stages_per_rank)
    case = drawn(placement, num_microbatches, seed=4)
    asked: list[int] = []

    def seeds(number: int) -> list[Order]:
        asked.append(number)
        return [random_order(replace(case, num_microbatches=number), random.Random(0)), *known(number)]

    def known(number: int) -> list[Order]:
        made = []
        for name in ("sequential", "gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "interleaved-zb"):
            with suppress(ConfigError):
                made.append(order_of(get(name)(3, stages_per_rank, number)))
        return made

    excesses = [cost_of(case.instance, order, objective, STRICT)[0] for order in seeds(num_microbatches)]
    assert min(excesses) < math.inf
    found = find(case.instance, objective=objective, seeds=seeds, time_budget_seconds=1e-6)
    check(case, found, objective)
    assert (
        found.value
        <= max(case.costs.work_seconds(placement, num_microbatches, trains=True)) + min(excesses) + 1e-9
    )
    assert set(asked) == {num_microbatches, *few_microbatches(case.placement.num_ranks, num_microbatches)}


def test_a_lazy_seed_is_decoded_first() -> None:
    case = Case(Placement.linear(1), replace(Costs.uniform(1), memory_caps=(2.0,)), 2)
    found = find(case.instance, seeds=lambda _: [((0, 0, 1, 1),)], time_budget_seconds=0.001)
    check(case, found, "span")


def test_where_a_seed_is_good_enough_nothing_is_searched() -> None:
    instance = equal(range(2), num_microbatches=4, cap=2.0)
    order = order_of(get("zb-h1")(2, 1, 4))
    found = find(
        instance, objective="makespan", seeds=lambda _: [order], target=13.0, time_budget_seconds=0.5
    )
    assert found.value <= 13.0
    assert found.num_ops < 1e4


def repeated(seed: int) -> list[Found]:
    return [
        find(drawn(Placement.looped(3, 2), number, seed=7).instance, time_budget_seconds=0.03, seed=seed)
        for number in (5, 17)
    ]


def test_the_same_arguments_give_the_same_order() -> None:
    first = repeated(seed=5)
    assert repeated(seed=5) == first
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "from test_find import repeated; print(repeated(seed=5))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == str(first)


def test_another_seed_may_give_another_order_which_fits_too() -> None:
    case = drawn(Placement.looped(3, 2), 5, seed=7)
    found = [find(case.instance, time_budget_seconds=0.03, seed=seed) for seed in range(3)]
    for each in found:
        check(case, each, "span")
    assert len({each.order for each in found}) > 1


@pytest.mark.parametrize("num_microbatches", [3, 8, 13])
def test_where_nothing_fits_it_says_so(num_microbatches: int) -> None:
    instance = equal((0, 1, 0, 1), num_microbatches=num_microbatches, cap=0.5)
    message = (
        rf"no order of {num_microbatches} microbatches on 2 ranks .* within the memory caps \[0.5, 0.5\]"
    )
    with pytest.raises(ScheduleError, match=message):
        find(instance, time_budget_seconds=0.02)


def test_more_stages_than_letters_are_refused() -> None:
    placement = Placement.linear(10_001)
    with pytest.raises(ScheduleError, match="10001 stages are more than the 10000 that can be searched"):
        find(instance_of(placement, 1, Costs.uniform(10_001)))


@both
def test_without_caps_nothing_limits_it(objective) -> None:
    case = drawn(Placement.v_shape(2), 3, seed=1)
    free = case.capped((math.inf, math.inf))
    limited, unlimited = (
        find(each.instance, objective=objective, time_budget_seconds=0.05) for each in (case, free)
    )
    check(free, unlimited, objective)
    assert unlimited.value <= limited.value


def test_ops_that_take_no_time_wait_for_transfers_alone() -> None:
    placement = Placement.linear(3)
    none = (0.0,) * 3
    costs = Costs(none, none, none, link=Link(1.0), memory_caps=(2.0,) * 3)
    case = Case(placement, costs, 4)
    found = find(case.instance, objective="makespan", time_budget_seconds=0.02)
    check(case, found, "makespan")
    assert found.value == 2 * 4.0  # two microbatches at a time, two hops there and two back
