"""How long ops keep their ranks: simulated with that, a step runs as it ran."""

import pytest

from evenflow.bill import Ran
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Forward, Payload, Send
from evenflow.pipe.times.times import costs_of, occupied
from evenflow.schedules import catalog
from evenflow.simulate import simulate

TAKING, SENDING = 0.125, 0.25  # seconds of an op's rank before and after it computes


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved-1f1b"])
def test_a_step_is_predicted_with_what_its_transfers_took(name):
    on_each = catalog.default_stages_per_rank(name)
    schedule, num_stages = catalog.get(name)(4, on_each, 8), 4 * on_each
    flow = Flow.chain(num_stages)
    seconds = [tuple(1.0 + (3 * stage + kind) % 4 / 2 for stage in range(num_stages)) for kind in range(3)]
    whole = simulate(schedule, flow, Costs(*seconds))
    ranks = []
    for rank, lane in enumerate(whole.lanes):
        free = (0.0, *lane.end_seconds[:-1])
        ops = []
        for op, came, start, end in zip(lane.ops, free, lane.start_seconds, lane.end_seconds, strict=True):
            ops.append((op, came, start + TAKING, end - SENDING))
            ops.append((Send(rank, 0, 0, Payload.ACTIVATION), end - SENDING, end - SENDING, end))
        ranks.append(Ran(ops, 0.0, lane.end_seconds[-1]))
    kept = occupied(ranks, flow)
    assert {(span.rank, span.op): (span.start_seconds, span.end_seconds) for span in kept} == {
        (span.rank, span.op): (span.start_seconds, span.end_seconds) for span in whole.spans
    }
    assert simulate(schedule, flow, costs_of(num_stages, kept)).lanes == whole.lanes


def test_a_value_may_be_taken_before_its_maker_is_free():
    """A message wakes the receiver while its sender is still at it."""
    flow, sent = Flow.chain(2), Send(0, 1, 0, Payload.ACTIVATION)
    first = Ran([(Forward(0, 0), 0.0, 0.0, 1.0), (sent, 1.0, 1.0, 2.0)], 0.0, 2.0)
    second = Ran([(Forward(1, 0), 0.0, 1.5, 3.0)], 0.0, 3.0)
    _, span = occupied([first, second], flow)
    assert (span.start_seconds, span.end_seconds) == (1.5, 3.0)
