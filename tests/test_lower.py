"""What is lowered is proven, keeps the schedule's order, and puts transfers where they delay no one."""

import pytest
from hypothesis import given, settings

from evenflow.errors import ScheduleError
from evenflow.ir import (
    Backward,
    ComputeOp,
    Costs,
    Flow,
    Forward,
    Handoff,
    InputGrad,
    Payload,
    Placement,
    Program,
    Recv,
    ReduceGrads,
    Schedule,
    Send,
    Unshard,
    parts,
)
from evenflow.lower import lower
from evenflow.rules import results
from evenflow.schedules.gpipe import gpipe
from evenflow.validate import prove
from random_pipelines import Pipeline, pipelines


def text(program: Program) -> list[str]:
    return [" ".join(str(op) for op in queue) for queue in program.ranks]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pipelines())
def test_lowered_is_proven(pipeline: Pipeline) -> None:
    """And in order; with reductions and with gathered parameters too."""
    drawn = pipeline.schedule, pipeline.flow, pipeline.costs
    program = lower(*drawn)
    proven = prove(program)
    assert len(proven.order) == sum(len(queue) for queue in program.ranks)
    computes = tuple(tuple(op for op in queue if isinstance(op, ComputeOp)) for queue in program.ranks)
    assert computes == pipeline.schedule.ranks
    assert_transfers_wait_for_no_later_compute(program, pipeline.costs)
    assert_reductions_are_proven(lower(*drawn, reduce_grads=True), pipeline.schedule)
    assert_parameters_are_gathered_first(lower(*drawn, unshard=True), program)


def assert_transfers_wait_for_no_later_compute(program: Program, costs: Costs) -> None:
    positive = min(*costs.forward_seconds, *costs.input_grad_seconds, *costs.weight_grad_seconds) > 0
    for queue in program.ranks if positive else ():
        for position, op in enumerate(queue):
            if isinstance(op, Send | Handoff):
                last = [other for other in queue[:position] if isinstance(other, ComputeOp)][-1]
                made = Forward if op.payload is Payload.ACTIVATION else InputGrad
                assert made(op.source, op.microbatch) in results(last)


def assert_reductions_are_proven(program: Program, schedule: Schedule) -> None:
    """The proof has each stand behind its stage's last weight gradient."""
    prove(program)
    reductions = [op for queue in program.ranks for op in queue if isinstance(op, ReduceGrads)]
    assert len(reductions) == (schedule.placement.num_stages if schedule.trains else 0)


def assert_parameters_are_gathered_first(program: Program, without: Program) -> None:
    """Each stage's before its first op; `without` gathering nothing else differs."""
    prove(program)
    for rank, queue in enumerate(program.ranks):
        gathered = [op.stage for op in queue if isinstance(op, Unshard)]
        assert sorted(gathered) == list(program.schedule.placement.stages_on(rank))
        for at, op in enumerate(queue):
            if isinstance(op, Unshard):
                before = [
                    part.stage for each in queue[:at] if isinstance(each, ComputeOp) for part in parts(each)
                ]
                assert op.stage not in before
    assert without.ranks == tuple(
        tuple(op for op in queue if not isinstance(op, Unshard)) for queue in program.ranks
    )


def test_a_receive_stands_behind_what_its_rank_has_begun() -> None:
    # Rank 1 can run 1F0 and 1F1, which need nothing, while rank 0 works ten times as long on its forward.
    flow = Flow(activations=frozenset({(0, 2)}), gradients=frozenset())
    placement = Placement((0, 1, 1))
    ranks = (
        (Forward(0, 0), Forward(0, 1)),
        (Forward(1, 0), Forward(1, 1), Forward(2, 0), Forward(2, 1)),
    )
    schedule = Schedule("by hand", placement, 2, ranks)
    slow = lower(schedule, flow, Costs((10.0, 1.0, 1.0), (0.0,) * 3, (0.0,) * 3))
    assert text(slow) == ["0F0 S0>2F0 0F1 S0>2F1", "1F0 1F1 R0>2F0 2F0 R0>2F1 2F1"]
    fast = lower(schedule, flow, Costs((1.0, 10.0, 1.0), (0.0,) * 3, (0.0,) * 3))
    assert text(fast) == ["0F0 S0>2F0 0F1 S0>2F1", "1F0 R0>2F0 R0>2F1 1F1 2F0 2F1"]


def test_stages_of_one_rank_hand_over() -> None:
    program = lower(gpipe(1, 2, 1), Flow.chain(2))
    assert text(program) == ["0F0 H0>1F0 1F0 1B0 H1>0B0 0B0"]
    assert not any(isinstance(op, Send | Recv) for op in program.ranks[0])


def test_an_evaluation_sends_no_gradients() -> None:
    ranks = ((Forward(0, 0),), (Forward(1, 0),))
    program = lower(Schedule("evaluation", Placement.linear(2), 1, ranks), Flow.chain(2))
    assert text(program) == ["0F0 S0>1F0", "R0>1F0 1F0"]


def test_a_schedule_that_cannot_run_is_refused() -> None:
    ranks = ((Backward(0, 0), Forward(0, 0)),)
    with pytest.raises(ScheduleError, match="rank 0 stands before 0B0, which waits for 0F0 on rank 0"):
        lower(Schedule("upside down", Placement.linear(1), 1, ranks), Flow.chain(1))
