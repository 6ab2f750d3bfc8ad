"""Reports list every fault, and stay readable when there are thousands."""

import pytest

from evenflow.ir import (
    Backward,
    ComputeOp,
    Flow,
    Forward,
    InputGrad,
    Overlap,
    Placement,
    Schedule,
    WeightGrad,
)
from evenflow.schedules.gpipe import gpipe
from evenflow.soundness import refusal, schedule_faults

SCHEDULE = gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2)


def faults_of(*queues: list[ComputeOp], flow: Flow | None = None) -> list[str]:
    return schedule_faults(SCHEDULE, flow or Flow.chain(2), queues)


def test_a_complete_schedule_has_none() -> None:
    assert schedule_faults(SCHEDULE, Flow.chain(2), SCHEDULE.ranks) == []


def test_without_any_backward_it_is_an_evaluation() -> None:
    assert faults_of([Forward(0, 0), Forward(0, 1)], [Forward(1, 0), Forward(1, 1)]) == []


def test_every_fault_is_listed() -> None:
    first = [Forward(0, 0), Forward(0, 0), Forward(0, 1), Forward(1, 0), Forward(0, 2), Forward(5, 0)]
    assert faults_of(first, [Forward(1, 1), Backward(1, 0)], flow=Flow.chain(3)) == [
        "flow edge 1>2 names a stage outside 0..1",
        "flow edge 2>1 names a stage outside 0..1",
        "1F0 on rank 0: stage 1 lives on rank 1",
        "0F2 on rank 0: there are only microbatches 0..1",
        "5F0 on rank 0: there are only stages 0..1",
        "0F0 stands 2 times: run it once",
        "0B0 is missing: rank 0 must run it",
        "0B1 is missing: rank 0 must run it",
        "1B1 is missing: rank 1 must run it",
    ]


def test_a_result_is_made_once_whoever_makes_it() -> None:
    first = [Forward(0, 0), Forward(0, 1), Backward(0, 0), Backward(0, 1), WeightGrad(0, 1)]
    second = [Forward(1, 0), Forward(1, 1), InputGrad(1, 0), WeightGrad(1, 0), InputGrad(1, 1)]
    assert faults_of(first, second) == [
        "0B1 and 0W1 do the same work: keep one of them",
        "1W1 is missing: rank 1 must run it",
    ]


def test_an_overlap_counts_as_its_two_ops_and_cannot_wait_for_itself() -> None:
    second = [
        Overlap(Forward(1, 0), Forward(1, 1)),
        Overlap(InputGrad(1, 0), WeightGrad(1, 0)),
        Backward(1, 1),
    ]
    assert faults_of(list(SCHEDULE.ranks[0]), second) == [
        "1I0&1W0: 1W0 and 1I0 wait for each other's results; run one after the other"
    ]


def test_each_rank_needs_a_queue() -> None:
    assert "1 queues for 2 ranks: give each rank one" in faults_of(list(SCHEDULE.ranks[0]))


def test_where_most_ops_are_missing_they_are_not_named_one_by_one() -> None:
    queue = (Forward(0, 0), Overlap(Forward(0, 1), Forward(0, 2)))
    (fault,) = schedule_faults(
        Schedule("wide", Placement((0,) * 400), 400, (queue,)), Flow.chain(400), [queue]
    )
    assert fault.startswith("400 stages and 400 microbatches take at least 160,000 ops, and there are 3: run")


def test_long_reports_are_cut() -> None:
    queues = [[Forward(0, microbatch) for microbatch in range(500)]] * 100
    text = str(refusal("huge", [f"fault {number}" for number in range(1000)], queues, [400] * 100))
    assert text.startswith("schedule 'huge' has 1000 faults:\n  - fault 0\n")
    assert "fault 19\n  and 980 more\n" in text
    assert "rank 0: ... 0F400 0F401" in text
    assert text.endswith("and 84 more ranks")
    assert len(text) < 4000


@pytest.mark.parametrize("start", [0, 3])
def test_the_drawing_shows_the_whole_of_a_short_queue(start: int) -> None:
    text = str(refusal("gpipe", ["x"], SCHEDULE.ranks, [start, start]))
    shown = " ".join(str(op) for op in SCHEDULE.ranks[0][start:])
    assert f"rank 0: {'... ' if start else ''}{shown}\n" in text


def test_a_schedule_is_data() -> None:
    assert Schedule(**{name: getattr(SCHEDULE, name) for name in Schedule.__slots__}) == SCHEDULE
