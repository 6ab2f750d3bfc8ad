"""What the kernel says of an order is what the simulator and an exact checker say, however it is read."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import STRICT, Case, cases, cost_of, equal, exact_excess, random_order

from brute_force import is_complete, peaks
from evenflow.memory import memory_faults
from evenflow.search.tables import Order, tables_of
from evenflow.search.timing import INFEASIBLE, Reading
from evenflow.simulate import simulate

SOME = settings(derandomize=True, deadline=None, max_examples=60)
objectives = st.sampled_from(["span", "makespan"])
seeds = st.integers(0, 2**32).map(random.Random)


def peaks_of(case: Case, order: Order) -> tuple[float, ...]:
    return tuple(map(float, peaks(case.schedule(order), case.costs)))


def capped_around(case: Case, order: Order, chosen: random.Random, *, least: float) -> Case:
    """With caps that the order meets exactly, or, where `least` is below 1, sometimes just misses."""
    held = case.costs.activation_bytes
    one = [
        max(held[stage] for stage in case.placement.stages_on(rank))
        for rank in range(case.placement.num_ranks)
    ]
    shares = [chosen.choice([1.0, 1.0, least, 2.0, math.inf]) for _ in one]
    return case.capped(
        tuple(
            max(peak * share if peak else share, most)
            for peak, share, most in zip(peaks_of(case, order), shares, one, strict=True)
        )
    )


def swapped(order: Order, chosen: random.Random) -> Order:
    """Two letters of one rank change places; often the order can't run then."""
    queues = [list(queue) for queue in order]
    queue = chosen.choice(queues)
    first, second = chosen.randrange(len(queue)), chosen.randrange(len(queue))
    queue[first], queue[second] = queue[second], queue[first]
    return tuple(map(tuple, queues))


@SOME
@given(cases(), seeds, objectives)
def test_a_strict_order_takes_what_the_simulator_and_exact_fractions_say(case, chosen, objective) -> None:
    order = random_order(case, chosen)
    case = capped_around(case, order, chosen, least=1.0)
    excess, done = cost_of(case.instance, order, objective, STRICT)
    assert done == order
    assert excess == exact_excess(case, order, objective)
    timeline = simulate(case.schedule(order), case.flow, case.costs)
    seconds = timeline.span_seconds if objective == "span" else timeline.makespan_seconds
    assert excess + tables_of(case.instance, objective).base == seconds


@SOME
@given(cases(), seeds, objectives)
def test_what_cannot_run_or_fit_is_infeasible_and_nothing_else_is(case, chosen, objective) -> None:
    order = random_order(case, chosen)
    case = capped_around(case, order, chosen, least=0.999)
    for _ in range(3):
        assert cost_of(case.instance, order, objective, STRICT)[0] == exact_excess(case, order, objective)
        order = swapped(order, chosen)


def test_a_standstill_is_infeasible() -> None:
    instance = equal(range(2), num_microbatches=1, cap=1.0)
    assert cost_of(instance, ((0, 2, 4), (1, 3, 5)), "span", STRICT)[0] < INFEASIBLE
    for first, second in [((2, 0, 4), (1, 3, 5)), ((0, 4, 2), (1, 3, 5)), ((0, 2, 4), (3, 1, 5))]:
        assert cost_of(instance, (first, second), "span", STRICT) == (math.inf, ())


def test_a_cap_counts_from_the_first_byte_over_it() -> None:
    order = ((0, 0, 1, 1, 2, 2),)
    for cap, fits in [(2.0, True), (2.0 - 1e-12, True), (2.0 - 1e-6, False)]:
        instance = equal(range(1), num_microbatches=2, cap=cap)
        assert math.isfinite(cost_of(instance, order, "span", STRICT)[0]) == fits


readings = st.builds(Reading, st.just(True), st.sampled_from([0.0, 0.5, 1.0]), st.just(0.0))


def hinted(order: Order, num_stages: int, chosen: random.Random) -> Order:
    """The order without some of its weight gradients, and the others anywhere."""
    queues = []
    for queue in order:
        kept = [letter for letter in queue if letter < 2 * num_stages]
        for letter in queue:
            if letter >= 2 * num_stages and chosen.random() < 0.3:
                kept.insert(chosen.randint(0, len(kept)), letter)
        queues.append(tuple(kept))
    return tuple(queues)


@SOME
@given(cases(), seeds, objectives, readings)
def test_a_lazy_order_becomes_a_strict_one_of_the_same_time(case, chosen, objective, reading) -> None:
    order = random_order(case, chosen)
    uncapped, case = case, capped_around(case, order, chosen, least=0.999)
    lazy = hinted(order, case.placement.num_stages, chosen)
    assert math.isfinite(cost_of(uncapped.instance, lazy, objective, reading)[0])
    excess, strict = cost_of(case.instance, lazy, objective, reading)
    if strict:
        schedule = case.schedule(strict)
        assert is_complete(schedule)
        assert memory_faults(schedule, case.costs) == []
        assert excess == exact_excess(case, strict, objective)
        assert cost_of(case.instance, strict, objective, STRICT) == (excess, strict)


@SOME
@given(cases(), seeds, readings)
def test_weight_gradients_make_room_wherever_they_can(case, chosen, reading) -> None:
    """An order that fits with them as early as can be fits lazily too, as its cap forces them."""
    num = case.placement.num_stages
    order = tuple(
        tuple(
            each
            for letter in queue
            if letter < 2 * num
            for each in ((letter, letter + num) if letter >= num else (letter,))
        )
        for queue in random_order(case, chosen)
    )
    case = capped_around(case, order, chosen, least=1.0)
    assert exact_excess(case, order, "span") < math.inf
    lazy = tuple(tuple(letter for letter in queue if letter < 2 * num) for queue in order)
    _, strict = cost_of(case.instance, lazy, "span", reading)
    assert memory_faults(case.schedule(strict), case.costs) == []


@pytest.mark.parametrize(
    ("fill", "expected"), [(1.0, (0, 0, 2, 2, 4, 4)), (0.6, (0, 0, 2, 2, 4, 4)), (0.5, (0, 0, 2, 4, 2, 4))]
)
def test_a_weight_gradient_fills_a_gap_of_its_share(fill: float, expected: tuple[int, ...]) -> None:
    instance = equal(range(2), num_microbatches=2, cap=2.0)
    slow = replace(instance, weight_grad_seconds=(2.0, 1.0))
    # Rank 0 waits a second for its second input gradient.
    _, (rank_0, _) = cost_of(slow, ((0, 0, 2, 2), (1, 3, 1, 3)), "span", Reading(True, fill, 0.0))
    assert rank_0 == expected


@SOME
@given(cases(), seeds, objectives, st.sampled_from([0.0, 0.5]))
def test_a_limit_stops_what_costs_more(case, chosen, objective, spread) -> None:
    reading = Reading(False, 1.0, spread)
    order = random_order(case, chosen)
    worst, _ = cost_of(case.instance, order, objective, STRICT)
    cost, _ = cost_of(case.instance, order, objective, reading)
    assert (cost > worst) <= (spread > 0)  # the mean excess of the ranks, which may be negative, is added
    assert cost_of(case.instance, order, objective, reading, limit=cost) == (cost, order)
    assert cost_of(case.instance, order, objective, reading, limit=cost - 0.1) == (math.inf, ())


def test_the_spread_is_of_the_mean_excess_of_all_ranks() -> None:
    instance = equal(range(2), num_microbatches=1, cap=1.0)
    order = ((0, 2, 4), (1, 3, 5))
    # Rank 0 waits 2 seconds for its input gradient, and rank 1, from the start, 1 for its forward.
    assert cost_of(instance, order, "makespan", Reading(False, 1.0, 0.5))[0] == 2.0 + 0.5 * 1.5
    assert cost_of(instance, order, "span", Reading(False, 1.0, 0.5))[0] == 2.0 + 0.5 * 1.0
