"""ZB-auto on unequal ranks: complete, within every cap, and never longer than what is written by hand."""

from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.ir import Costs, Flow, Schedule
from evenflow.ir.costs import Link
from evenflow.ir.op import Forward, InputGrad, WeightGrad
from evenflow.memory import memory_faults, peak_bytes
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.schedules.zb_auto import zb_auto
from evenflow.schedules.zb_h1 import zb_h1
from evenflow.schedules.zb_h2 import zb_h2
from evenflow.simulate import simulate


@st.composite
def unequal_costs(draw: st.DrawFn) -> Costs:
    num_ranks = draw(st.integers(1, 6))

    def per_rank(values: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(values) for _ in range(num_ranks))

    seconds = st.floats(0, 10, allow_subnormal=False)
    held = per_rank(st.floats(0.1, 10))
    shares = per_rank(st.floats(0, 1))
    # From just one microbatch, down to the rounding, to more than can ever be used.
    fitting = per_rank(st.one_of(st.just(1.0), st.floats(1, 12)))
    slow = Link(draw(seconds), draw(st.floats(1, 100)))
    return Costs(
        per_rank(seconds),
        per_rank(seconds),
        per_rank(seconds),
        Link(draw(seconds)),
        links={(0, 1): slow},
        sent_bytes={(0, 1): draw(st.floats(0, 100))},
        activation_bytes=held,
        weight_grad_bytes=tuple(whole * share for whole, share in zip(held, shares, strict=True)),
        memory_caps=draw(
            st.sampled_from([None, tuple(whole * times for whole, times in zip(held, fitting, strict=True))])
        ),
    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(unequal_costs(), st.integers(1, 20))
@example(replace(Costs.uniform(4), memory_caps=(1.0, 1.0, 1.0, 1.0)), 5)
@example(replace(Costs.uniform(4), memory_caps=(1.0, 2.0, 3.0, 4.0)), 9)
@example(
    replace(Costs.uniform(3, 0.0, 0.0, 0.0), activation_bytes=(0.0,) * 3, weight_grad_bytes=(0.0,) * 3), 7
)
def test_it_is_complete_within_the_caps_and_never_longer(costs: Costs, num_microbatches: int) -> None:
    num_ranks = costs.num_stages
    flow = Flow.chain(num_ranks)
    schedule = zb_auto(num_ranks, 1, num_microbatches, costs)
    span = simulate(schedule, flow, costs).span_seconds
    assert memory_faults(schedule, costs) == []
    for queue in schedule.ranks:
        for kind in (Forward, InputGrad, WeightGrad):
            assert [op.microbatch for op in queue if isinstance(op, kind)] == list(range(num_microbatches))
    for method in (zb_h1, zb_h2, one_f_one_b):
        other = method(num_ranks, 1, num_microbatches)
        if not memory_faults(other, costs):
            assert span <= simulate(other, flow, costs).span_seconds * (1 + 1e-9)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_without_costs_it_has_the_memory_and_the_bubble_of_zb_h1(num_ranks: int) -> None:
    costs = Costs.uniform(num_ranks)
    schedule, other = zb_auto(num_ranks, 1, 4 * num_ranks), zb_h1(num_ranks, 1, 4 * num_ranks)
    assert schedule.name == "zb-auto"
    assert max(peak_bytes(schedule, costs)) == num_ranks
    flow = Flow.chain(num_ranks)
    assert simulate(schedule, flow, costs).span_bubble == simulate(other, flow, costs).span_bubble


def test_memory_turns_into_speed() -> None:
    flow = Flow.chain(4)
    bubbles = []
    for cap in range(1, 9):
        costs = replace(Costs.uniform(4), memory_caps=(float(cap),) * 4)
        bubbles.append(simulate(zb_auto(4, 1, 16, costs), flow, costs).span_bubble)
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[0] > 0.6
    assert bubbles[6] == 0  # 2 p - 1 microbatches are all that equal ops need


def test_it_fits_unequal_ops_better_than_a_fixed_order() -> None:
    costs = Costs.uniform(4, forward_seconds=2.0)
    spans = [
        simulate(method(4, 1, 12), Flow.chain(4), costs).span_seconds
        for method in (zb_h1, zb_h2, lambda *sizes: zb_auto(*sizes, costs))
    ]
    assert spans == [54, 51, 48]  # the last is the work of a rank, and no order is shorter


def test_a_slow_rank_never_waits() -> None:
    costs = Costs((1.0, 1.0, 2.0, 1.0), (1.0, 1.0, 2.0, 1.0), (1.0, 1.0, 2.0, 1.0))
    timeline = simulate(zb_auto(4, 1, 12, costs), Flow.chain(4), costs)
    assert timeline.lanes[2].start_seconds[1:] == timeline.lanes[2].end_seconds[:-1]


def _num_first_forwards(schedule: Schedule) -> list[int]:
    return [len(list(takewhile(lambda op: isinstance(op, Forward), queue))) for queue in schedule.ranks]


def test_forwards_fill_the_whole_wait_for_the_first_gradient() -> None:
    costs = Costs.uniform(3, latency_seconds=2.0)
    schedule = zb_auto(3, 1, 30, costs)
    # On rank 0 it arrives after 3 forwards, 2 input gradients and 4 transfers.
    assert _num_first_forwards(schedule) == [13, 7, 1]
    assert simulate(schedule, Flow.chain(3), costs).span_bubble == 0


def test_the_warm_up_keeps_the_lead_of_a_forward_where_memory_ends() -> None:
    costs = replace(Costs.uniform(3, latency_seconds=5.0), memory_caps=(4.0, 4.0, 4.0))
    assert _num_first_forwards(zb_auto(3, 1, 30, costs)) == [4, 3, 1]


def test_a_forward_left_out_can_pay() -> None:
    # Found by search: 42 seconds where no rank may put a gradient before its forward.
    costs = Costs((2.0, 3.0, 3.0), (3.0, 4.0, 1.0), (3.0, 3.0, 3.0), memory_caps=(5.0, 3.0, 4.0))
    assert simulate(zb_auto(3, 1, 4, costs), Flow.chain(3), costs).span_seconds == 41


def test_a_cap_below_one_microbatch_is_refused_with_numbers() -> None:
    costs = replace(Costs.uniform(3), activation_bytes=(4.0, 2.0, 4.0), memory_caps=(3.0, 2.0, 0.5))
    with pytest.raises(ConfigError) as refusal:
        zb_auto(3, 1, 4, costs)
    assert str(refusal.value) == (
        "rank 0 may hold 3, and one microbatch takes 4; rank 2 may hold 0.5, and one microbatch "
        "takes 4: raise the memory cap or cut the stages finer"
    )


def test_costs_of_other_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="costs name 3 stages, and 2 are placed: price each stage"):
        zb_auto(2, 1, 4, Costs.uniform(3))
    with pytest.raises(ConfigError, match="memory_caps name 1 ranks, and there are 2"):
        zb_auto(2, 1, 4, replace(Costs.uniform(2), memory_caps=(4.0,)))
