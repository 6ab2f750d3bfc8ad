"""No bound exceeds an optimum, none is weaker than its closed form, and the strong ones are reached."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from evenflow.bounds import Bound, Bounds, Instance, instance_of, lower_bounds
from evenflow.errors import ScheduleError
from evenflow.ir import Costs, Placement
from exact_schedules import brute_force, optimum

TOLERANCE = 1e-6
linear, looped, vee = Placement.linear, Placement.looped, Placement.v_shape


def uniform(
    placement: Placement,
    num_microbatches: int,
    *,
    seconds: tuple[float, float, float] = (1.0, 1.0, 1.0),
    delay: float = 0.0,
    cap: float = math.inf,
) -> Instance:
    """Equal stages; each rank's together take `seconds` of F, I and W, and 1 of what `cap` limits."""
    num_ranks = placement.num_ranks
    each = [(one,) * num_ranks for one in seconds]
    costs = Costs.of_ranks(placement, *each, latency_seconds=delay, memory_caps=(cap,) * num_ranks)
    return instance_of(placement, num_microbatches, costs)


def idle_rate(bound: Bound, bounds: Bounds) -> float:
    """The share of a bound that exceeds the busiest rank's work."""
    return 1 - bounds.work_seconds / bound.seconds


# Placement, microbatches, transfer seconds, cap, whether of the makespan, the bound, and the least idle rate
# that a search has reached.
RATES = [
    pytest.param(linear(8), 32, 0.1, 8, False, 0.0926, 0.0926, id="linear-8"),
    pytest.param(linear(8), 32, 0.1, 12, False, 0.0438, 0.0438, id="linear-12"),
    pytest.param(linear(8), 32, 0.1, 15, False, 0.0144, 0.0144, id="linear-15"),
    pytest.param(vee(8), 32, 0.1, 8, False, 0.0371, 0.0381, id="V-8"),
    pytest.param(vee(8), 32, 0.1, 8, True, 0.0551, 0.0551, id="V-8-makespan"),
    pytest.param(vee(8), 32, 0.1, 5, False, 0.1168, 0.1185, id="V-5"),
    pytest.param(vee(8), 32, 0.1, 4, False, 0.1406, 0.1802, id="V-4"),
    pytest.param(vee(8), 32, 0.0, 7, False, 0.0254, 0.0352, id="V-7-no-delay"),
    pytest.param(vee(8), 32, 0.0, 6, False, 0.0542, 0.0542, id="V-6-no-delay"),
    pytest.param(vee(8), 32, 0.0, 5, False, 0.0813, 0.0813, id="V-5-no-delay"),
    pytest.param(vee(8), 32, 0.0, 4, False, 0.1070, 0.1070, id="V-4-no-delay"),
    pytest.param(looped(8, 4), 32, 0.1, 9.75, True, 0.0381, 0.0481, id="looped-4-9.75"),
    pytest.param(looped(8, 4), 32, 0.1, 10, True, 0.0357, 0.0410, id="looped-4-10"),
    pytest.param(looped(8, 2), 32, 0.1, 11.5, True, 0.0419, 0.0457, id="looped-2-11.5"),
    pytest.param(vee(16), 64, 0.1, 16, True, 0.0588, 0.0639, id="V-16-ranks"),
    pytest.param(vee(32), 256, 0.1, 32, True, 0.0313, 0.0349, id="V-32-ranks"),
]


@pytest.mark.parametrize(
    ("placement", "num_microbatches", "delay", "cap", "makespan", "bound", "reached"), RATES
)
def test_idle_rates_of_equal_stages(
    placement: Placement,
    num_microbatches: int,
    delay: float,
    cap: float,
    makespan: bool,
    bound: float,
    reached: float,
) -> None:
    bounds = lower_bounds(uniform(placement, num_microbatches, delay=delay, cap=cap))
    rate = idle_rate(bounds.makespan if makespan else bounds.span, bounds)
    assert round(rate, 4) == bound <= reached


def seconds_and_delay(rng: random.Random) -> tuple[tuple[float, float, float], float]:
    return (rng.uniform(0.5, 2), rng.uniform(0.5, 2), rng.uniform(0, 2)), rng.choice([0.0, rng.random()])


@pytest.mark.parametrize("seed", range(20))
def test_linear_placement_has_its_closed_form(seed: int) -> None:
    rng = random.Random(seed)
    (forward, back, weight), delay = seconds_and_delay(rng)
    for num_ranks in (2, 5, 8):
        for cap in range(1, 2 * num_ranks + 1):
            instance = uniform(
                linear(num_ranks), 3 * num_ranks, seconds=(forward, back, weight), delay=delay, cap=cap
            )
            hops = num_ranks - 1
            first = max(0.0, (num_ranks - cap) * forward + hops * (back + 2 * delay))
            last = max(0.0, hops * (forward + back + 2 * delay) - (cap - 1) * (back + weight))
            bounds = lower_bounds(instance)
            assert bounds.span.seconds >= bounds.work_seconds + first + last - TOLERANCE
            assert bounds.makespan.seconds >= bounds.work_seconds + hops * (forward + delay) - TOLERANCE


@pytest.mark.parametrize("seed", range(20))
def test_v_placement_is_at_least_its_closed_form(seed: int) -> None:
    rng = random.Random(seed)
    (forward, _, weight), delay = seconds_and_delay(rng)
    for num_ranks in (2, 5, 8):
        for half_stages in range(2, 4 * num_ranks):
            instance = uniform(
                vee(num_ranks),
                3 * num_ranks,
                seconds=(forward, forward, weight),
                delay=delay,
                cap=half_stages / 2,
            )
            hops = num_ranks - 1
            idle = max(0.0, (2 * num_ranks - half_stages) * forward / 2 + 2 * hops * delay)
            bounds = lower_bounds(instance)
            assert bounds.span.seconds >= bounds.work_seconds + idle - TOLERANCE
            idle = hops * (forward / 2 + delay)
            assert bounds.makespan.seconds >= bounds.work_seconds + idle - TOLERANCE


@pytest.mark.parametrize(
    "placement", [vee(4), looped(4, 2), looped(4, 4), Placement(vee(4).rank_of * 2)], ids=str
)
def test_any_placement_is_at_least_what_weight_gradients_at_the_end_allow(placement: Placement) -> None:
    rank_of = placement.rank_of
    share, delay, num_microbatches = 4 / len(rank_of), 0.1, 12
    per_rank = len(rank_of) // 4
    delays = [0.0 if here == after else delay for here, after in itertools.pairwise(rank_of)]
    for cap in range(per_rank, 4 * per_rank):
        bounds = lower_bounds(uniform(placement, num_microbatches, delay=delay, cap=cap * share))
        for rank in range(4):
            first, last = placement.stages_on(rank)[0], placement.stages_on(rank)[-1]
            round_trip = (2 * len(rank_of) - 1 - first - last) * share + sum(delays[first:])
            round_trip += sum(delays[last:])
            idle = max(0.0, round_trip - cap * share)
            last_start = idle + (3 * per_rank * num_microbatches - 1 - cap) * share
            travel = 2 * (first * share + sum(delays[:first]))
            assert bounds.span.seconds >= travel + last_start + 2 * share - TOLERANCE


def random_instance(rng: random.Random) -> Instance:
    """Draw a small instance in whole numbers: equal stages or unequal ones, any kind of placement."""
    num_ranks = rng.choice([2, 2, 3])
    loop = looped(num_ranks, 2)
    shuffled = Placement(tuple(rng.sample(loop.rank_of, loop.num_stages)))
    placement = rng.choice([linear(num_ranks), linear(num_ranks), loop, vee(num_ranks), shuffled])
    rank_of = placement.rank_of
    num_stages, equal = len(rank_of), rng.random() < 0.4
    num_microbatches = rng.randint(1, 6 // num_stages + 1)

    def numbers(low: int, high: int, count: int = num_stages) -> tuple[int, ...]:
        if equal:
            return (rng.randint(low, high),) * count
        return tuple(rng.randint(low, high) for _ in range(count))

    remote = [here != after for here, after in itertools.pairwise(rank_of)]
    up = numbers(0, 3, num_stages - 1)
    down = up if equal else numbers(0, 3, num_stages - 1)
    held = numbers(1, 3)
    kept = held if rng.random() < 0.5 else tuple(rng.randint(0, size) for size in held)
    caps = []
    for rank in range(num_ranks):
        needed = sum(size for size, owner in zip(held, rank_of, strict=True) if owner == rank)
        more = rng.randint(0, needed * (num_microbatches - 1) + 1)
        caps.append(math.inf if rng.random() < 0.1 else needed + more)
    return Instance(
        placement,
        num_microbatches,
        numbers(1, 4),
        numbers(1, 4),
        numbers(0, 4),
        tuple(seconds * there for seconds, there in zip(up, remote, strict=True)),
        tuple(seconds * there for seconds, there in zip(down, remote, strict=True)),
        held,
        kept,
        tuple(caps),
    )


def test_no_bound_exceeds_an_optimum_and_most_reach_it() -> None:
    rng = random.Random(0)
    known = reached = 0
    for _ in range(60):
        instance = random_instance(rng)
        bounds = lower_bounds(instance)
        for objective, bound in (("span", bounds.span), ("makespan", bounds.makespan)):
            best = optimum(instance, objective, limit_seconds=2)
            if best is not None:
                assert bound.seconds <= best + TOLERANCE, (objective, bound, best, instance)
                known += 1
                reached += math.ceil(bound.seconds - TOLERANCE) == best
    assert known > 100
    assert reached > 0.6 * known


# Where a bound would be too high if an argument left out one of its conditions, and the exact span.
CONDITIONS = [
    pytest.param(
        Instance(
            Placement((0, 0, 1, 1)),
            num_microbatches=2,
            forward_seconds=(1, 1, 4, 3),
            input_grad_seconds=(3, 3, 4, 4),
            weight_grad_seconds=(1, 4, 1, 2),
            up_seconds=(0, 0, 0),
            down_seconds=(0, 0, 0),
            held_memory=(2, 1, 2, 1),
            kept_memory=(1, 1, 0, 0),
            caps=(5, math.inf),
        ),
        50,
        id="a higher stage may free what lower ones held before its weight gradient",
    ),
    pytest.param(
        Instance(
            Placement((0, 1, 0, 1)),
            num_microbatches=2,
            forward_seconds=(3, 1, 4, 3),
            input_grad_seconds=(1, 3, 1, 3),
            weight_grad_seconds=(2, 3, 3, 0),
            up_seconds=(3, 0, 0),
            down_seconds=(0, 2, 0),
            held_memory=(1, 3, 2, 3),
            kept_memory=(1, 3, 2, 3),
            caps=(7, 11),
        ),
        33,
        id="below a stage, input gradients may be undone after its last one",
    ),
    pytest.param(
        Instance(
            Placement((0, 1, 0, 0)),
            num_microbatches=3,
            forward_seconds=(1, 1, 1, 5),
            input_grad_seconds=(1, 1, 1, 1),
            weight_grad_seconds=(0, 4, 0, 0),
            up_seconds=(0, 0, 0),
            down_seconds=(0, 0, 0),
            held_memory=(1, 2, 2, 2),
            kept_memory=(1, 2, 2, 2),
            caps=(math.inf, 7),
        ),
        30,
        id="a rank may start late after one with a lower stage",
    ),
]


@pytest.mark.parametrize(("instance", "span"), CONDITIONS)
def test_every_condition_counts(instance: Instance, span: int) -> None:
    assert optimum(instance, "span") == span
    assert lower_bounds(instance).span.seconds <= span + TOLERANCE


def test_two_ranks_by_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(40):
        instance = random_instance(rng)
        if instance.placement != linear(2) or instance.num_microbatches > 3:
            continue
        found = brute_force(instance)
        assert found is not None
        span, makespan = found
        bounds = lower_bounds(instance)
        assert bounds.span.seconds <= span + TOLERANCE
        assert bounds.makespan.seconds <= makespan + TOLERANCE
        # Whole starts can't split a second between two ranks.
        assert optimum(instance, "span") == math.ceil(span)
        assert optimum(instance, "makespan") == makespan


@pytest.mark.parametrize("seed", range(40))
def test_more_memory_never_raises_a_bound(seed: int) -> None:
    instance = replace(random_instance(random.Random(seed)), num_microbatches=7)
    for rank in range(instance.placement.num_ranks):
        needed = sum(instance.held_memory[stage] for stage in instance.placement.stages_on(rank))
        caps = [needed + more / 2 for more in range(16 * needed)]
        ladder = [
            lower_bounds(replace(instance, caps=(*instance.caps[:rank], cap, *instance.caps[rank + 1 :])))
            for cap in [*caps, math.inf]
        ]
        for measure in ("span", "makespan"):
            seconds = [getattr(bounds, measure).seconds for bounds in ladder]
            assert all(more <= less + TOLERANCE for less, more in itertools.pairwise(seconds))


@pytest.mark.parametrize("seed", range(10))
def test_a_cap_beyond_all_activations_is_none(seed: int) -> None:
    instance = random_instance(random.Random(seed))
    free, vast = ((cap,) * instance.placement.num_ranks for cap in (math.inf, 1e6))
    assert lower_bounds(replace(instance, caps=vast)) == lower_bounds(replace(instance, caps=free))


def test_a_cap_counts_in_whole_activations() -> None:
    spans = [lower_bounds(uniform(vee(3), 9, cap=cap)).span.seconds for cap in (1.5, 1.75, 2)]
    assert spans[0] == spans[1] > spans[2]


def test_without_limits_the_longest_chain_counts() -> None:
    one = uniform(linear(4), 1, seconds=(1, 2, 3), delay=0.5)
    bounds = lower_bounds(one)
    # Up 4 forwards and 3 transfers, down the same with input gradients, and the last weight gradient.
    assert bounds.makespan.seconds == bounds.span.seconds == 4 * 1 + 3 * 0.5 + 4 * 2 + 3 * 0.5 + 3
    assert bounds.work_seconds == 6


def test_whole_backwards_are_input_gradients_without_weight_gradients() -> None:
    bounds = lower_bounds(uniform(linear(4), 8, seconds=(1, 2, 0), cap=4))
    # 1F1B: its bubble is (p - 1) / (m + p - 1).
    assert idle_rate(bounds.makespan, bounds) == idle_rate(bounds.span, bounds) == pytest.approx(3 / 11)


def test_free_ops_and_weightless_activations_are_no_trouble() -> None:
    instance = uniform(vee(2), 2, seconds=(0, 0, 0), cap=1)
    assert lower_bounds(instance).span.seconds == 0
    weightless = replace(instance, held_memory=(0, 0, 0, 0), kept_memory=(0, 0, 0, 0), caps=(0, 0))
    assert lower_bounds(weightless).makespan.seconds == 0


def test_memory_sums_may_be_rounded() -> None:
    tenths = (0.1,) * 6
    whole = replace(uniform(vee(3), 5), held_memory=(1,) * 6, kept_memory=(1,) * 6)
    rounded = replace(whole, held_memory=tenths, kept_memory=tenths)
    assert 0.1 + 0.2 > 0.3 > 2 * 0.1
    for caps in ((2, 0.2), (3, 0.3), (6, 0.6), (7, 0.7)):
        bounds = [
            lower_bounds(replace(instance, caps=(cap,) * 3))
            for instance, cap in zip((whole, rounded), caps, strict=True)
        ]
        assert bounds[0].span.seconds == pytest.approx(bounds[1].span.seconds)
    alone = replace(
        uniform(looped(1, 3), 2, cap=0.3),
        held_memory=(0.1, 0.1, 0.1),
        kept_memory=(0.1, 0.1, 0.1),
    )
    assert lower_bounds(alone).span.seconds == pytest.approx(6)


def test_every_rank_that_cannot_hold_a_microbatch_is_named() -> None:
    instance = replace(uniform(vee(3), 2), caps=(0.5, 1, 0.75))
    with pytest.raises(
        ScheduleError, match=r"rank 0 has a cap of 0.5 and needs 1.0 .* rank 2 has a cap of 0.75"
    ):
        lower_bounds(instance)
