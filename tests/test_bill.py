"""The bill of a step adds up, and each idle second stands under its cause."""

import pytest

from evenflow.bill import Bill, Ran, bills, of_timeline
from evenflow.cli.report import bill_table
from evenflow.ir import Costs, Flow
from evenflow.ir.op import Backward, Forward, Payload, Recv, Send
from evenflow.ir.timeline import Timeline
from evenflow.schedules import catalog
from evenflow.simulate import simulate

FLOW = Flow.chain(2)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_what_is_predicted_is_the_schedules_and_the_stages_doing(name):
    schedule = catalog.get(name)(4, 1, 8)
    balanced = simulate(schedule, Flow.chain(4), Costs.uniform(4, 2.0, 2.0, 2.0))
    costs = Costs((1.0, 2.0, 3.0, 2.0), (2.0,) * 4, (2.0,) * 4)
    timeline = simulate(schedule, Flow.chain(4), costs)
    found = bills(of_timeline(timeline), Flow.chain(4), balanced)
    for rank, bill in enumerate(found):
        assert bill.step == pytest.approx(timeline.makespan_seconds)
        assert bill.compute == pytest.approx(timeline.busy_seconds(rank))
        assert bill.schedule == pytest.approx(balanced.idle_seconds(rank), abs=2.1)
        assert bill.transfer == bill.host == bill.update == 0
    assert found[0].imbalance > 0, "it is faster than the others, and waits for them"
    same = bills(of_timeline(balanced), Flow.chain(4), balanced)
    assert [bill.imbalance for bill in same] == [0] * 4


def ran_late() -> list[Ran]:
    """Two ranks, one microbatch: times are such that each cause has its own number."""
    send, arrival = Send(0, 1, 0, Payload.ACTIVATION), Recv(0, 1, 0, Payload.ACTIVATION)
    back, comes = Send(1, 0, 0, Payload.GRADIENT), Recv(1, 0, 0, Payload.GRADIENT)
    first = [
        (Forward(0, 0), 0.5, 0.5, 2.5),  # half a second of the host's before it
        (send, 2.5, 2.5, 2.75),
        (comes, 2.75, 2.75, 2.75),
        (Backward(0, 0), 2.75, 8.0, 9.0),
    ]
    second = [
        (arrival, 0.0, 0.0, 0.0),
        (Forward(1, 0), 0.0, 3.0, 4.0),  # made at 2.5
        (Backward(1, 0), 4.0, 4.0, 7.0),
        (back, 7.0, 7.0, 7.125),
    ]
    return [Ran(first, 0.0, 10.0, update_seconds=0.25), Ran(second, 0.0, 7.5)]


def test_each_cause_has_its_seconds():
    balanced = simulate(catalog.get("1f1b")(2, 1, 1), FLOW, Costs.uniform(2, 1.0, 1.0, 0.0))
    one, other = bills(ran_late(), FLOW, balanced)
    assert one == Bill(
        compute=3.0, schedule=2.0, imbalance=2.25, transfer=0.25 + 1.0, host=0.5 + 0.75, update=0.25
    )
    # It is done 2.5 seconds before the step is.
    assert other == Bill(
        compute=4.0, schedule=2.0, imbalance=2.5 + 2.5 - 2.0, transfer=0.5 + 0.125, host=0.375, update=0.0
    )
    assert one.step == other.step == 10.0


def test_the_table_shows_both():
    timeline = simulate(catalog.get("1f1b")(2, 1, 4), FLOW, Costs.uniform(2))
    found = bills(of_timeline(timeline), FLOW, timeline)
    table = bill_table(found, found)
    assert table.row_count == 4
    assert [column.header for column in table.columns][2:] == [
        *("compute", "schedule", "imbalance", "transfer", "host", "update", "step")
    ]


def test_a_step_of_nothing_has_an_empty_bill():
    (bill,) = bills([Ran([], 1.0, 1.0)], FLOW, Timeline.of(1, []))
    assert bill.step == bill.idle == 0
