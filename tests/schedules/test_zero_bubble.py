"""ZB-H1 and ZB-H2: memory, and bubble in closed form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.ir import Costs, Flow
from evenflow.memory import peak_bytes
from evenflow.schedules.zb_h1 import zb_h1
from evenflow.schedules.zb_h2 import zb_h2
from evenflow.simulate import simulate


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_no_rank_holds_more_than_the_paper_says(num_ranks: int) -> None:
    costs = Costs.uniform(num_ranks)
    for num_microbatches in range(1, 3 * num_ranks + 3):
        sizes = (num_ranks, 1, num_microbatches)
        assert peak_bytes(zb_h1(*sizes), costs) == (min(num_microbatches, num_ranks),) * num_ranks
        assert peak_bytes(zb_h2(*sizes), costs) == (min(num_microbatches, 2 * num_ranks - 1),) * num_ranks


@settings(derandomize=True, deadline=None)
@given(
    num_ranks=st.integers(1, 6),
    more_microbatches=st.integers(0, 12),
    forward=st.integers(1, 9),
    input_grad=st.integers(1, 9),
    weight_grad=st.integers(0, 9),
)
def test_zb_h1_idles_as_its_formula_says(
    num_ranks: int, more_microbatches: int, forward: int, input_grad: int, weight_grad: int
) -> None:
    num_microbatches = num_ranks + more_microbatches
    weight_grad = min(forward, input_grad, weight_grad)
    costs = Costs.uniform(num_ranks, forward, input_grad, weight_grad)
    timeline = simulate(zb_h1(num_ranks, 1, num_microbatches), Flow.chain(num_ranks), costs)
    idle = timeline.span_seconds - num_microbatches * (forward + input_grad + weight_grad)
    assert idle == (num_ranks - 1) * (forward + input_grad - weight_grad)


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("more_microbatches", [0, 1, 9])
def test_zb_h2_has_no_gap_at_all(num_ranks: int, more_microbatches: int) -> None:
    num_microbatches = 2 * num_ranks - 1 + more_microbatches
    schedule = zb_h2(num_ranks, 1, num_microbatches)
    timeline = simulate(schedule, Flow.chain(num_ranks), Costs.uniform(num_ranks))
    assert timeline.span_bubble == 0
    for lane in timeline.lanes:
        assert lane.start_seconds[1:] == lane.end_seconds[:-1]
    # What remains of the makespan is the wait for the first microbatch.
    assert timeline.bubble == pytest.approx((num_ranks - 1) / (3 * num_microbatches + num_ranks - 1))


@pytest.mark.parametrize(("method", "bubble"), [(zb_h1, 0.0926), (zb_h2, 0.0144)])
def test_bubble_with_transfers(method, bubble: float) -> None:
    costs = Costs.uniform(8, latency_seconds=0.1)
    timeline = simulate(method(8, 1, 32), Flow.chain(8), costs)
    assert timeline.span_bubble == pytest.approx(bubble, abs=5e-5)
