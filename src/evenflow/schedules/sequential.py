"""Stop and wait: one microbatch at a time through all stages, forward and back. The naive baseline.

It is what a model split over several devices does without a pipeline: at any moment one rank works and the
others idle, so its bubble is (p - 1) / p for p ranks, whatever the number of microbatches. In return a stage
holds the activations of a single microbatch. Source: "naive model parallelism", figure 2(b) of Huang et al.,
"GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019, arXiv:1811.06965.
"""

from evenflow.ir.op import Backward, ComputeOp, Forward
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule


def sequential(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the stop-and-wait schedule, on a looped placement. Raises `ConfigError` for a count below 1.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(sequential(num_ranks=2, stages_per_rank=1, num_microbatches=2)))
    time   0   1   2   3   4   5   6   7   8   9   10  11
    rank 0 0F0  .   .   .  0B0 --- 0F1  .   .   .  0B1 ---
    rank 1  .  1F0 1B0 ---  .   .   .  1F1 1B1 ---  .   .
    """
    placement = Placement.looped(num_ranks, stages_per_rank)
    ranks = tuple(_queue(placement.stages_on(rank), num_microbatches) for rank in range(num_ranks))
    return Schedule("sequential", placement, num_microbatches, ranks)


def _queue(stages: tuple[int, ...], num_microbatches: int) -> tuple[ComputeOp, ...]:
    queue: list[ComputeOp] = []
    for microbatch in range(num_microbatches):
        queue += [Forward(stage, microbatch) for stage in stages]
        queue += [Backward(stage, microbatch) for stage in reversed(stages)]
    return tuple(queue)
