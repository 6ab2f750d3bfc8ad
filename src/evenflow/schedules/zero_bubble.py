"""What the zero-bubble schedules share: a 1F1B whose weight gradients are held back to fill idle time.

Source: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, arXiv:2401.10241, section 2. No
other rank waits for a weight gradient, so it can run whenever its rank would idle.
"""

from evenflow.ir.op import ComputeOp, Forward, InputGrad, WeightGrad
from evenflow.schedules.alternate import alternate


def split_queue(
    stage: int, num_microbatches: int, num_warmup: int, num_deferred: int
) -> tuple[ComputeOp, ...]:
    """Return one stage's ops: `num_warmup` forwards, then a forward, an input and a weight gradient in turn.

    A weight gradient runs `num_deferred` rounds after the input gradient of its microbatch; those that are
    left when the rounds end follow at once. So at most `num_warmup + num_deferred + 1` microbatches are held.

    >>> print(*split_queue(stage=0, num_microbatches=3, num_warmup=1, num_deferred=1))
    0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2
    """
    microbatches = range(num_microbatches)
    forwards = [Forward(stage, microbatch) for microbatch in microbatches]
    input_grads = [InputGrad(stage, microbatch) for microbatch in microbatches]
    queue: list[ComputeOp] = []
    for op in alternate(forwards, input_grads, num_warmup):
        queue.append(op)
        if isinstance(op, InputGrad) and op.microbatch >= num_deferred:
            queue.append(WeightGrad(stage, op.microbatch - num_deferred))
    left = range(max(0, num_microbatches - num_deferred), num_microbatches)
    return (*queue, *(WeightGrad(stage, microbatch) for microbatch in left))
