"""Run: what a training run was, and what its steps took, as it is kept after the run has ended."""

from collections.abc import Sequence
from dataclasses import dataclass

from evenflow.errors import ConfigError

_NUM_LAST = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Some measurements of one thing, in seconds.

    >>> Spread(median=0.2, least=0.19, most=0.4).median
    0.2
    """

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage's ops took for one microbatch: medians in seconds, None where it ran none of a kind.

    `first` is the node that the stage begins with. A whole backward is no sum of the two halves of another.
    """

    rank: int
    first: str
    forward_seconds: float
    backward_seconds: float | None
    input_grad_seconds: float | None
    weight_grad_seconds: float | None

    @property
    def whole_backward_seconds(self) -> float | None:
        """One microbatch's backward, in one piece or in both halves; None where none ran.

        >>> StageRecord(0, "embed", 1.0, None, 1.25, 0.75).whole_backward_seconds
        2.0
        """
        if self.input_grad_seconds is not None and self.weight_grad_seconds is not None:
            return self.input_grad_seconds + self.weight_grad_seconds
        return self.backward_seconds


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What a rank did: the median share of a step's makespan that it idled, and its peak of memory.

    `peak_bytes`: the most bytes of tensors that were there at once in one step; None where nobody measured.

    >>> RankRecord(idle=0.125, peak_bytes=2**30).idle
    0.125
    """

    idle: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended.

    - `started`: the time, as ISO 8601 writes it; `machine`: what it ran on, in words.
    - `item`: what a batch holds `items_per_batch` of, such as tokens.
    - `num_timed`: of how many steps what follows tells; the first ones, which warm caches up, are left out.
    - `step`: all of a step, its update included. `feed_seconds`: the median wait for a batch, before it.
    - `pipeline`: from the first op's start to the last one's end over all ranks; of the last of these steps,
      as are `stages` and what ranks idle. `simulated_seconds`: what the simulator makes of `stages`.

    Raises `ConfigError` for no stage, and for a stage on a rank that there is not.

    >>> stages, ranks = (StageRecord(0, "embed", 0.1, 0.3, None, None),), (RankRecord(0.0, None),)
    >>> step = Spread(median=0.4, least=0.4, most=0.5)
    >>> told = ("mine", "2026-01-01T12:00:00", "a laptop", "0.1.0", "1f1b", 1, "tokens", 512)
    >>> run = Run(
    ...     *told, 20, 10, step, step, feed_seconds=0.1, simulated_seconds=0.4, stages=stages, ranks=ranks
    ... )
    >>> run.items_per_second
    1024.0
    """

    name: str
    started: str
    machine: str
    evenflow: str
    schedule: str
    num_microbatches: int
    item: str
    items_per_batch: int
    num_steps: int
    num_timed: int
    step: Spread
    pipeline: Spread
    feed_seconds: float
    simulated_seconds: float
    stages: tuple[StageRecord, ...]
    ranks: tuple[RankRecord, ...]

    def __post_init__(self) -> None:
        for number, stage in enumerate(self.stages):
            if stage.rank >= len(self.ranks):
                raise ConfigError(
                    f"stages[{number}].rank = {stage.rank}, and there are {len(self.ranks)} ranks, from 0"
                )
        if not self.stages:
            raise ConfigError("stages = [] must name at least one stage")

    @property
    def items_per_second(self) -> float:
        """The throughput: items of a batch over the seconds of a median step and its wait for the batch."""
        return self.throughput(self.step.median + self.feed_seconds)

    def throughput(self, batch_seconds: float) -> float:
        """Items in a second, where a batch takes so long; 0 where it takes no time."""
        return self.items_per_batch / batch_seconds if batch_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step, from 1 on: its seconds, its wait for a batch, its loss; None where there is none.

    That is where it was no finite number, and where the step was left out for bad numbers.

    `loss` is what the model's loss function returned, over the whole batch.

    >>> Step(number=1, seconds=0.4, feed_seconds=0.1, loss=2.5).loss
    2.5
    """

    number: int
    seconds: float
    feed_seconds: float
    loss: float | None


def first_and_last_loss(steps: Sequence[Step]) -> tuple[float, float] | None:
    """The first step's loss and the mean of the last 20, as one batch's is noisy; None where there is none.

    >>> first_and_last_loss([Step(1, 1.0, 0.0, 4.0), Step(2, 1.0, 0.0, None), Step(3, 1.0, 0.0, 2.0)])
    (4.0, 3.0)
    """
    losses = [step.loss for step in steps if step.loss is not None]
    last = losses[-_NUM_LAST:]
    return (losses[0], sum(last) / len(last)) if losses else None
