"""A small run that never was, its steps and its plan."""

from evenflow.bill import Bill
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Payload, Send
from evenflow.journal.last_step import EdgeRecord, HeldStage, LastStep, lane_record
from evenflow.journal.run import RankRecord, Run, Spread, StageRecord, Step
from evenflow.plan.choice import Degrees
from evenflow.plan.plan import Plan, PlannedRank, PlannedStage, Prediction
from evenflow.plan.rank_memory import RankMemory
from evenflow.schedules.one_f_one_b import one_f_one_b
from evenflow.simulate import simulate

STAGES = (
    StageRecord(0, "embed", 0.010, 0.026, None, None),
    StageRecord(1, "head", 0.020, None, 0.015, 0.020),
)
RUN = Run(
    name="mine",
    started="2026-11-22T04:38:18+00:00",
    machine="2 × CPU",
    evenflow="0.1.0",
    schedule="1f1b",
    num_microbatches=4,
    item="tok",
    items_per_batch=256,
    num_steps=12,
    num_timed=10,
    step=Spread(0.2, 0.19, 0.4),
    pipeline=Spread(0.18, 0.17, 0.3),
    feed_seconds=0.056,
    simulated_seconds=0.175,
    stages=STAGES,
    ranks=(RankRecord(0.25, 1000), RankRecord(0.2, None)),
)


def _last_step() -> LastStep:
    """1F1B of four microbatches, as it was simulated, and half as long again, with what was sent and held."""
    timeline = simulate(one_f_one_b(2, 1, 4), Flow.chain(2), Costs.uniform(2, 0.01, 0.01, 0.01))
    predicted, measured = [], []
    for rank, lane in enumerate(timeline.lanes):
        rows = list(zip(lane.ops, lane.start_seconds, lane.start_seconds, lane.end_seconds, strict=True))
        predicted.append(lane_record(rows))
        longer = []
        for op, _, start, end in rows:
            came = longer[-1][3] if longer else 0.0
            longer.append((op, came, 1.5 * start, 1.5 * end - 0.001))
            if rank == 0 and str(op).startswith("0F"):
                sent = longer[-1][3]
                longer.append((Send(0, 1, op.microbatch, Payload.ACTIVATION), sent, sent, sent + 0.001))
        held = [1000 + 500 * (at % 3) for at in range(len(longer))]
        measured.append(lane_record(longer, held_bytes=held))
    bills = (Bill(0.1, 0.02, 0.01, 0.005, 0.003, 0.002), Bill(0.11, 0.02, 0.0, 0.005, 0.003, 0.002))
    return LastStep(
        tuple(predicted),
        tuple(measured),
        (Bill(0.12, 0.02, 0.0, 0.0, 0.0, 0.0),) * 2,
        bills,
        (HeldStage(0, ("embed", "h.0"), 3, 1000, 0.4), HeldStage(1, ("h.1", "head"), 3, 2000, 0.6)),
        (EdgeRecord(0, 1, "F", 1, 4096), EdgeRecord(1, 0, "B", 1, 4096)),
        (2500.0, 1e9),
    )


LAST_STEP = _last_step()
STEPS = (Step(1, 0.5, 0.0, -1.25), Step(2, 0.2, 0.01, None))
MEMORY = RankMemory(100.0, 100.0, 200.0, 300.0, 50.0, 50.0, 0.0)
PLAN = Plan(
    degrees=Degrees(pipeline=2),
    schedule="1f1b",
    stages_per_rank=1,
    microbatch_size=1,
    num_microbatches=4,
    max_leaf_share=0.1,
    stages=(
        PlannedStage(0, "embed", 3, (), 0.010, 0.010, 0.010, 0.0),
        PlannedStage(1, "head", 3, (), 0.020, 0.020, 0.020, 64.0),
    ),
    ranks=(PlannedRank("CPU", 0, MEMORY, 1e9, 0.2), PlannedRank("CPU", 1, MEMORY, 1e9, 0.1)),
    prediction=Prediction(0.16, 0.15, 0.0, 0.01, 0.12, 1600.0, None),
)
