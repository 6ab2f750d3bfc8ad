"""1F1B: after a short warm-up, each rank alternates one forward and one backward.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019, and its form
with one synchronous update a step, "PipeDream-Flush", in "Memory-Efficient Pipeline-Parallel DNN Training",
2021, arXiv:2006.09503. The bubble is GPipe's, (p - 1) / (m + p - 1) for p ranks and m microbatches, but rank
r holds the activations of at most p - r microbatches instead of all m.
"""

from evenflow.ir.op import Backward, ComputeOp, Forward
from evenflow.ir.schedule import Schedule
from evenflow.schedules.alternate import alternate
from evenflow.schedules.sizes import one_stage_a_rank


def one_f_one_b(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the 1F1B schedule, one stage a rank.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank > 1`: that takes interleaving, whose
    warm-up is another.

    >>> from evenflow.view.text import draw_schedule
    >>> print(draw_schedule(one_f_one_b(num_ranks=2, stages_per_rank=1, num_microbatches=3)))
    time   0   1   2   3   4   5   6   7   8   9   10  11
    rank 0 0F0 0F1  .   .  0B0 --- 0F2 0B1 ---  .  0B2 ---
    rank 1  .  1F0 1B0 --- 1F1 1B1 --- 1F2 1B2 ---  .   .
    """
    placement = one_stage_a_rank("1f1b", num_ranks, stages_per_rank)
    # Just enough forwards to keep the later stages fed until the first gradient returns.
    ranks = tuple(
        alternating_queue(rank, num_microbatches, num_warmup=num_ranks - 1 - rank)
        for rank in range(num_ranks)
    )
    return Schedule("1f1b", placement, num_microbatches, ranks)


def alternating_queue(stage: int, num_microbatches: int, num_warmup: int) -> tuple[ComputeOp, ...]:
    """Return one stage's ops: `num_warmup` forwards, then a forward and a backward in turn.

    So at most `num_warmup + 1` microbatches are held.

    >>> print(*alternating_queue(stage=0, num_microbatches=3, num_warmup=1))
    0F0 0F1 0B0 0F2 0B1 0B2
    """
    forwards = [Forward(stage, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Backward(stage, microbatch) for microbatch in range(num_microbatches)]
    return tuple(alternate(forwards, backwards, num_warmup))
