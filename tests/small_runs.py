"""A small run that never was, its steps and its plan."""

from evenflow.journal.run import RankRecord, Run, Spread, StageRecord, Step
from evenflow.plan.plan import Degrees, Plan, PlannedRank, PlannedStage, Prediction
from evenflow.plan.rank_memory import RankMemory

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
