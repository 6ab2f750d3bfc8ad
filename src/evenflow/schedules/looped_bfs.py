"""Looped breadth-first: several stages a rank, and every microbatch through a stage before the next stage.

Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2023, arXiv:2211.05953. It is GPipe's order on
stages that are dealt out in a loop, so the ranks start after a v-th of the time. For p ranks, v stages a rank
and m >= p microbatches the bubble is (p - 1) / (v m + p - 1). A stage holds the activations of all m
microbatches; in return its weights are used, and its gradients complete, once a step and in one piece, which
is what data parallelism with sharded weights wants.
"""

from dataclasses import replace

from evenflow.ir.schedule import Schedule
from evenflow.schedules.gpipe import gpipe


def looped_bfs(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the looped breadth-first schedule, on a looped placement.

    Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(looped_bfs(num_ranks=2, stages_per_rank=2, num_microbatches=2)))
    time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
    rank 0 0F0 0F1 2F0 2F1  .   .   .  2B0 --- 2B1 --- 0B0 --- 0B1 ---
    rank 1  .  1F0 1F1 3F0 3F1 3B0 --- 3B1 --- 1B0 --- 1B1 ---  .   .
    """
    return replace(gpipe(num_ranks, stages_per_rank, num_microbatches), name="looped-bfs")
