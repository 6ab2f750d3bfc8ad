"""DualPipe-V: two stages a rank in a V, where a forward and a backward run as one fused unit.

Source: DeepSeek-AI, DualPipe, 2025, github.com/deepseek-ai/DualPipe ("DualPipeV"), after Qi et al., "DualPipe
could be better without the Dual", Sea AI Lab, 2025, which cuts DualPipe (DeepSeek-V3 Technical Report, 2024,
arXiv:2412.19437, section 3.2.1) in half. Inside a fused unit one op computes while the other transfers. Write
F, B, I and W for the seconds of a stage's forward, whole backward, input and weight gradient, and F&B for a
fused unit. The source's bubble is (p - 1) (F&B + B - 3 W). Where m >= 2p, transfers take nothing, W <= F = I
and B <= F&B <= F + B, the last two ranks, which idle most, idle for exactly that in the makespan; with F < I
for no longer. Before them, a rank fuses a pair less than the next one, and so idles F + B - F&B less. A rank
holds at most 2 p + 1 activations of a stage, p + 1/2 microbatches; one microbatch costs it two.

The published form asks for m >= 2p. Here fewer microbatches run the schedule of 2p from which the others are
struck out: what waits for what stays within a microbatch, so nothing can come to a standstill.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count

from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, WeightGrad, parts
from evenflow.ir.schedule import Schedule
from evenflow.schedules.sizes import v_placement


def dualpipe_v(num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    """Return the DualPipe-V schedule, on a V-shaped placement.

    Raises `ConfigError` for a count below 1, and for `stages_per_rank` other than 2.

    >>> for queue in dualpipe_v(num_ranks=2, stages_per_rank=2, num_microbatches=4).ranks:
    ...     print(*queue)
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3&3B1 3F2&0B0 3B2 3F3&0B1 3B3 0I2 0W2 0I3 0W3
    1F0 2F0 1F1 2F1 1F2 2B0 2F2&1B0 1F3&2B1 2F3&1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """
    placement = v_placement("dualpipe-v", num_ranks, stages_per_rank)
    published = max(num_microbatches, 2 * num_ranks)
    ranks = tuple(
        tuple(_struck(_queue(rank, num_ranks, published), num_microbatches)) for rank in range(num_ranks)
    )
    return Schedule("dualpipe-v", placement, num_microbatches, ranks)


def _queue(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[ComputeOp]:
    """One rank's ops, step by step as the source numbers them, for at least `2 * num_ranks` microbatches."""
    down, up = rank, 2 * num_ranks - 1 - rank
    to_turn = num_ranks - 1 - rank
    forwards = {stage: count() for stage in (down, up)}
    backwards = {stage: count() for stage in (down, up)}
    held_back: deque[WeightGrad] = deque()

    def forward(stage: int) -> Forward:
        return Forward(stage, next(forwards[stage]))

    def backward(stage: int) -> Backward:
        return Backward(stage, next(backwards[stage]))

    def input_grad(stage: int) -> InputGrad:
        op = InputGrad(stage, next(backwards[stage]))
        held_back.append(WeightGrad(stage, op.microbatch))
        return op

    for _ in range(2 * to_turn):  # step 1
        yield forward(down)
    for _ in range(rank + 1):  # step 2
        yield forward(down)
        yield forward(up)
    for _ in range(to_turn):  # step 3
        yield input_grad(up)
        yield held_back.popleft()
        yield forward(up)
    for at in range(num_microbatches - 2 * num_ranks + rank + 1):  # step 4
        if at == 0 and to_turn == 0:
            # At the turn fusing would only delay what the ranks above wait for.
            yield forward(down)
            yield backward(up)
        else:
            yield Overlap(forward(down), backward(up))
        yield Overlap(forward(up), backward(down))
    for _ in range(to_turn):  # step 5
        yield backward(up)
        yield Overlap(forward(up), backward(down))
    for at in range(2 * (rank + 1)):  # step 6: the second half holds weight gradients back
        yield (backward if at <= rank else input_grad)((up, down)[at % 2])
    for _ in range(to_turn):  # step 7
        yield held_back.popleft()
        yield input_grad(down)
    yield from held_back  # step 8


def _struck(queue: Iterable[ComputeOp], num_microbatches: int) -> Iterator[ComputeOp]:
    """The ops of a queue without those of later microbatches; of a fused unit the other op may remain."""
    for op in queue:
        match [part for part in parts(op) if part.microbatch < num_microbatches]:
            case [_, _]:
                yield op
            case [alone]:
                yield alone
