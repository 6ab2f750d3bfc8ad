"""What was measured of one node: numbers alone, as they are kept on disk."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of a node's inputs and results, by place in `Node.inputs` and `Node.makes`, and what else."""

    inputs: tuple[int, ...]
    results: tuple[int, ...]
    private_bytes: int


NOTHING_KEPT = Kept((), (), 0)


@dataclass(frozen=True, slots=True)
class Measured:
    """The costs of one call of a node, on one microbatch.

    - `forward_seconds`; `backward_seconds`, all of it; `input_grad_seconds`, the part of that which makes
      gradients for other nodes (all of it where it cannot be taken apart).
    - `entry_seconds`: what a stage without a node takes, forward and backward together.
    - `saved`: what is in memory until the backward; `kept`: what the input gradient leaves for the weight
      gradient.
    - `result_bytes`: of each result the memory that it lies in, 0 where that was there before.
    - `forward_peak_bytes`, `backward_peak_bytes`: the most that was allocated meanwhile.
    """

    forward_seconds: float
    backward_seconds: float
    input_grad_seconds: float
    entry_seconds: float
    saved: Kept
    kept: Kept
    result_bytes: tuple[int, ...]
    forward_peak_bytes: int
    backward_peak_bytes: int
