"""Every mutation of a good program is refused by name; nothing but `prove` makes a proven one."""

import copy
import pickle
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.errors import ScheduleError
from evenflow.ir import (
    Backward,
    ComputeOp,
    Costs,
    Flow,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Placement,
    Program,
    Recv,
    ReduceGrads,
    Schedule,
    Send,
    WeightGrad,
    parse_op,
)
from evenflow.lower import lower
from evenflow.rules import dependencies, results
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.validate import ProvenProgram, prove
from random_pipelines import Pipeline, pipelines, split_backwards

RELAY = Flow(
    activations=frozenset({(0, 1), (1, 2), (2, 3), (0, 3)}),
    gradients=frozenset({(3, 2), (2, 1), (3, 1), (1, 0)}),
)
GOOD = [
    pytest.param(lower(get("gpipe")(2, 1, 3), Flow.chain(2)), id="gpipe"),
    pytest.param(lower(get("1f1b")(4, 1, 4), RELAY), id="1f1b-relay"),
    pytest.param(lower(get("sequential")(2, 2, 2), RELAY), id="sequential-looped"),
    pytest.param(lower(get("forward-only")(2, 2, 2), RELAY), id="forward-only-looped"),
    pytest.param(lower(split_backwards(get("1f1b")(3, 1, 3)), Flow.chain(3)), id="1f1b-split"),
    pytest.param(lower(get("gpipe")(2, 1, 2), Flow.chain(2), reduce_grads=True), id="gpipe-reduced"),
]
every_program = pytest.mark.parametrize("program", GOOD)


def program_of(*rows: str, num_microbatches: int, rank_of: tuple[int, ...], flow: Flow) -> Program:
    """A program by hand, whose schedule is what it computes."""
    ranks = tuple(tuple(parse_op(word) for word in row.split()) for row in rows)
    computes = tuple(tuple(op for op in queue if isinstance(op, ComputeOp)) for queue in ranks)
    return Program(Schedule("by hand", Placement(rank_of), num_microbatches, computes), flow, ranks)


def with_queue(program: Program, rank: int, queue: tuple[Op, ...]) -> Program:
    return replace(program, ranks=(*program.ranks[:rank], queue, *program.ranks[rank + 1 :]))


def faults(program: Program) -> str:
    with pytest.raises(ScheduleError) as caught:
        prove(program)
    return str(caught.value)


@every_program
def test_dropping_any_op_is_refused_by_name(program: Program) -> None:
    for rank, queue in enumerate(program.ranks):
        for position, op in enumerate(queue):
            mutant = with_queue(program, rank, queue[:position] + queue[position + 1 :])
            assert f"- {op} is missing" in faults(mutant)


@every_program
def test_doubling_any_op_is_refused_by_name(program: Program) -> None:
    for rank, queue in enumerate(program.ranks):
        for position, op in enumerate(queue):
            for place in (position, len(queue)):
                mutant = with_queue(program, rank, (*queue[:place], op, *queue[place:]))
                assert f"- {op} stands 2 times" in faults(mutant)


@every_program
def test_swapping_any_two_neighbours_that_depend_is_refused_by_name(program: Program) -> None:
    num_swapped = 0
    for rank, queue in enumerate(program.ranks):
        for position, (first, second) in enumerate(pairwise(queue)):
            if not waits_for(second, first, program.flow):
                continue
            num_swapped += 1
            mutant = with_queue(program, rank, (*queue[:position], second, first, *queue[position + 2 :]))
            assert f"- {second} stands before {first} on rank {rank}, and needs it" in faults(mutant)
    assert num_swapped > 0


def waits_for(second: Op, first: Op, flow: Flow) -> bool:
    match first, second:
        case (Forward() | Backward() | InputGrad() | WeightGrad(), _) if isinstance(second, ComputeOp):
            return first.stage == second.stage and not set(results(first)).isdisjoint(
                dependencies(second, flow)
            )
        case (Forward() | Backward() | InputGrad(), Send() | Handoff()):
            kinds = "F" if isinstance(first, Forward) else "B"
            return (kinds, first.stage, first.microbatch) == (
                second.payload.value,
                second.source,
                second.microbatch,
            )
        case (Recv() | Handoff(), Forward() | Backward() | InputGrad()):
            kinds = "F" if isinstance(second, Forward) else "B"
            return (kinds, second.stage, second.microbatch) == (
                first.payload.value,
                first.target,
                first.microbatch,
            )
        case (Backward() | WeightGrad(), ReduceGrads()):
            return first.stage == second.stage
        case _:
            return False


def test_an_exchange_saves_two_ranks_that_send_to_each_other() -> None:
    # The deadlock below, mended on one of its two ranks: rank 0 sends and receives as one group.
    program = program_of(
        "0F0 S0>1F0 0F1 S0>1F1&R1>0B0 0B0 R1>0B1 0B1",
        "R0>1F0 1F0 1B0 S1>0B0 R0>1F1 1F1 1B1 S1>0B1",
        num_microbatches=2,
        rank_of=(0, 1),
        flow=Flow.chain(2),
    )
    proven = prove(program)
    steps = [f"{rank}:{op}" for rank, op in proven.order]
    assert steps.index("1:S1>0B0") + 1 == steps.index("0:R1>0B0")
    assert steps.index("0:S0>1F1") + 1 == steps.index("1:R0>1F1")


def test_an_exchange_comes_after_what_it_sends_and_before_what_needs_it() -> None:
    program = program_of(
        "S0>1F0&R1>0B0 0F0 0B0",
        "R0>1F0 1F0 1B0 S1>0B0",
        num_microbatches=1,
        rank_of=(0, 1),
        flow=Flow.chain(2),
    )
    assert "S0>1F0 stands before 0F0 on rank 0, and needs it" in faults(program)
    program = program_of(
        "0F0 0B0 S0>1F0&R1>0B0",
        "R0>1F0 1F0 1B0 S1>0B0",
        num_microbatches=1,
        rank_of=(0, 1),
        flow=Flow.chain(2),
    )
    assert "0B0 stands before S0>1F0&R1>0B0 on rank 0, and needs it" in faults(program)


def test_a_rank_in_an_exchange_that_no_one_ends_is_told() -> None:
    program = program_of(
        "0F0 S0>1F0&R1>0B0 0B0",
        "1F0 R0>1F0 1B0 S1>0B0",
        num_microbatches=1,
        rank_of=(0, 1),
        flow=Flow(frozenset({(0, 1)}), frozenset({(1, 0)})),
    )
    assert "1F0 stands before R0>1F0 on rank 1, and needs it" in faults(program)


def test_over_filling_a_rank_is_refused_naming_the_op() -> None:
    program = lower(get("gpipe")(2, 1, 3), Flow.chain(2))
    assert prove(program, replace(Costs.uniform(2), memory_caps=(3.0, 3.0)))
    with pytest.raises(ScheduleError) as caught:
        prove(program, replace(Costs.uniform(2), memory_caps=(3.0, 2.0)))
    assert "- rank 1 holds 3 in 1F2, over its cap of 2" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("0F0 0B0 G0 G0", "G0 stands 2 times on rank 0: run it once"),
        ("0F0 0B0 G0 G1", "G1 on rank 0: stage 1 lives on rank 1"),
        ("0F0 0B0 G0 G7", "G7 on rank 0: there are only stages 0..1"),
        ("0F0 0B0", "G0 is missing: rank 0 must run it, as other stages are reduced"),
        ("0F0 G0 0B0", "G0 stands before 0B0 on rank 0, and needs it"),
    ],
)
def test_reductions_stand_once_behind_all_weight_gradients(row: str, fault: str) -> None:
    flow = Flow(frozenset(), frozenset())
    program = program_of(row, "1F0 1B0 G1", num_microbatches=1, rank_of=(0, 1), flow=flow)
    assert fault in faults(program)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("0F0 U0 0B0", "0F0 stands before U0 on rank 0, and needs it"),
        ("0F0 0B0", "U0 is missing: rank 0 must run it, as other stages are gathered"),
    ],
)
def test_parameters_are_gathered_before_all_ops_of_a_stage(row: str, fault: str) -> None:
    flow = Flow(frozenset(), frozenset())
    program = program_of(row, "U1 1F0 1B0", num_microbatches=1, rank_of=(0, 1), flow=flow)
    assert fault in faults(program)


def test_mis_paired_transfers_are_refused_naming_both() -> None:
    program = program_of(
        "0F0 0F1 S0>1F1 S0>1F0",
        "R0>1F0 R0>1F1 1F0 1F1",
        num_microbatches=2,
        rank_of=(0, 1),
        flow=Flow.chain(2),
    )
    message = faults(program)
    assert "mis-pairing: S0>1F1 on rank 0 meets R0>1F0 on rank 1" in message
    assert "mis-pairing: S0>1F0 on rank 0 meets R0>1F1 on rank 1" in message


def test_two_ranks_that_send_to_each_other_first_deadlock() -> None:
    # With one buffer this would run; on the weakest machine both sends wait for a receive behind the other.
    program = program_of(
        "0F0 S0>1F0 0F1 S0>1F1 R1>0B0 0B0 R1>0B1 0B1",
        "R0>1F0 1F0 1B0 S1>0B0 R0>1F1 1F1 1B1 S1>0B1",
        num_microbatches=2,
        rank_of=(0, 1),
        flow=Flow.chain(2),
    )
    message = faults(program)
    assert (
        "deadlock: rank 0 stands before S0>1F1 and waits for rank 1, "
        "rank 1 stands before S1>0B0 and waits for rank 0"
    ) in message
    assert "rank 0: 0F0 S0>1F0 0F1 S0>1F1 R1>0B0" in message


def test_who_is_held_up_by_a_deadlock_is_told_apart() -> None:
    flow = Flow(activations=frozenset({(0, 1), (0, 2), (1, 2), (2, 3)}), gradients=frozenset())
    program = program_of(
        "0F0 S0>2F0 S0>1F0",
        "R0>1F0 1F0 S1>2F0",
        "R1>2F0 R0>2F0 2F0 S2>3F0",
        "R2>3F0 3F0",
        num_microbatches=1,
        rank_of=(0, 1, 2, 3),
        flow=flow,
    )
    message = faults(program)
    assert "has 2 faults" in message
    assert (
        "deadlock: rank 0 stands before S0>2F0 and waits for rank 2, "
        "rank 2 stands before R1>2F0 and waits for rank 1, rank 1 stands before R0>1F0 and waits for rank 0"
    ) in message
    assert "held up by a deadlock: rank 3 stands before R2>3F0 and waits for rank 2" in message


@pytest.mark.parametrize("extra", ["S0>1F7", "R1>0F0", "H0>1F0", "S0>1B0", "S0>9F0"])
def test_a_transfer_that_no_edge_asks_for_is_refused(extra: str) -> None:
    program = lower(get("gpipe")(2, 1, 2), Flow.chain(2))
    mutant = with_queue(program, 0, (*program.ranks[0], parse_op(extra)))
    assert f"{extra} on rank 0 is asked for by no edge of the flow" in faults(mutant)


def test_a_transfer_on_the_wrong_rank_is_refused() -> None:
    program = program_of("0F0", "S0>1F0 R0>1F0 1F0", num_microbatches=1, rank_of=(0, 1), flow=Flow.chain(2))
    message = faults(program)
    assert "S0>1F0 is missing on rank 0: 1F0 needs it" in message
    assert "S0>1F0 on rank 1 is asked for by no edge" in message


def test_all_faults_are_told_at_once() -> None:
    program = lower(get("gpipe")(2, 1, 2), Flow.chain(2))
    queue = tuple(op for op in program.ranks[0] if str(op) not in {"0F0", "S0>1F1", "R1>0B1"})
    message = faults(with_queue(program, 0, queue))
    assert "has 3 faults" in message
    assert all(f"- {op} is missing" in message for op in ("0F0", "S0>1F1", "R1>0B1"))


def test_another_order_than_the_schedule_s_is_refused() -> None:
    program = lower(get("gpipe")(1, 1, 2), Flow.chain(1))
    swapped = (program.ranks[0][1], program.ranks[0][0], *program.ranks[0][2:])
    assert "rank 0 runs 0F1 as its compute op 0, its schedule says 0F0" in faults(
        with_queue(program, 0, swapped)
    )


def test_a_flow_beyond_the_stages_is_refused() -> None:
    program = lower(get("gpipe")(2, 1, 1), Flow.chain(2))
    assert "flow edge 1>2 names a stage outside 0..1" in faults(replace(program, flow=Flow.chain(3)))


def test_an_op_of_no_stage_is_refused() -> None:
    program = lower(get("gpipe")(2, 1, 1), Flow.chain(2))
    mutant = with_queue(program, 0, (*program.ranks[0], Forward(9, 0)))
    assert "9F0 on rank 0: there are only stages 0..1" in faults(mutant)


def test_a_program_without_a_rank_s_queue_is_refused() -> None:
    program = lower(get("gpipe")(2, 1, 1), Flow.chain(2))
    assert "1 queues for 2 ranks" in faults(replace(program, ranks=program.ranks[:1]))


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_the_witness_is_a_run_of_the_program(pipeline: Pipeline) -> None:
    proven = prove(lower(pipeline.schedule, pipeline.flow, pipeline.costs))
    for rank, queue in enumerate(proven.program.ranks):
        assert tuple(op for owner, op in proven.order if owner == rank) == queue
    rank_of = pipeline.schedule.placement.rank_of
    done = set()
    for step, (_, op) in enumerate(proven.order):
        match op:
            case _ if isinstance(op, ComputeOp):
                assert set(dependencies(op, pipeline.flow)) <= done
                done |= set(results(op))
            case Send():
                received = Recv(op.source, op.target, op.microbatch, op.payload)
                assert proven.order[step + 1] == (rank_of[op.target], received)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pipelines(), st.integers(0, 2**32))
def test_what_validates_simulates(pipeline: Pipeline, seed: int) -> None:
    # Shuffle each queue a little: some mutants still validate, and those must run as schedules too.
    lowered = lower(pipeline.schedule, pipeline.flow, pipeline.costs)
    generator = random.Random(seed)
    ranks = []
    for queue in map(list, lowered.ranks):
        if len(queue) > 1:
            place = generator.randrange(len(queue) - 1)
            queue[place], queue[place + 1] = queue[place + 1], queue[place]
        ranks.append(tuple(queue))
    computes = tuple(tuple(op for op in queue if isinstance(op, ComputeOp)) for queue in ranks)
    schedule = replace(pipeline.schedule, ranks=computes)
    try:
        prove(Program(schedule, pipeline.flow, tuple(ranks)))
    except ScheduleError:
        return
    simulate(schedule, pipeline.flow, pipeline.costs)


def test_nothing_else_makes_a_proven_program() -> None:
    proven = prove(lower(get("gpipe")(2, 1, 1), Flow.chain(2)))
    with pytest.raises(TypeError, match="is made by evenflow"):
        ProvenProgram(proven.program, proven.order, made_by=None)
    with pytest.raises((TypeError, ValueError)):
        replace(proven, order=())
    assert copy.deepcopy(proven) == proven
    assert pickle.loads(pickle.dumps(proven)) == proven
