"""A run's plan beside what was measured: number by number, and which is the furthest off."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from evenflow.journal.run import Run
from evenflow.plan.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Beside:
    """One number, planned and measured; None where nobody planned it, or measured it."""

    what: str
    planned: float | None
    measured: float | None

    @property
    def deviation(self) -> float | None:
        """The share by which the measured number is over the planned one (below 0: under it).

        None where one of them is missing, or the planned one is 0.

        >>> Beside("step", planned=2.0, measured=2.5).deviation
        0.25
        """
        if self.planned is None or self.measured is None or self.planned == 0:
            return None
        return self.measured / self.planned - 1

    @property
    def difference(self) -> float:
        """How far apart the two are, at least 0; 0 where one is missing."""
        return 0.0 if self.deviation is None or self.planned is None else abs(self.deviation) * self.planned


def fits(run: Run, plan: Plan) -> bool:
    """Whether the plan is of steps such as the run's: of as many microbatches."""
    return plan.num_microbatches == run.num_microbatches


def step_numbers(run: Run, plan: Plan | None) -> tuple[Beside, ...]:
    """Seconds of a step, of the pipeline's part, and of the rest: gradients' sums, the update, agreeing."""
    told = plan.prediction if plan is not None and fits(run, plan) else None
    return (
        Beside("step", _of(told, lambda it: it.step_seconds), run.step.median),
        Beside("its pipeline", _of(told, lambda it: it.pipeline_seconds), run.pipeline.median),
        Beside(
            "the rest",
            _of(told, lambda it: it.reduce_seconds + it.update_seconds),
            max(0.0, run.step.median - run.pipeline.median),
        ),
    )


def rank_numbers(run: Run, plan: Plan | None) -> tuple[tuple[Beside, Beside], ...]:
    """For each rank, the share of the pipeline's time that it idles, and its peak of memory in bytes."""
    ranks = plan.ranks if plan is not None and fits(run, plan) else (None,) * len(run.ranks)
    return tuple(
        (
            Beside(f"rank {number}, idle", _of(told, lambda it: it.idle), measured.idle),
            Beside(f"rank {number}, memory", _of(told, lambda it: it.memory.allocated), measured.peak_bytes),
        )
        for number, (told, measured) in enumerate(zip(ranks, run.ranks, strict=True))
    )


def stage_numbers(run: Run, plan: Plan | None) -> tuple[tuple[Beside, ...], ...]:
    """For each stage, seconds of one microbatch: forward, backward, input gradient, weight gradient.

    The backward is the sum of the two gradients, where those were computed apart.
    """
    stages = plan.stages if plan is not None else (None,) * len(run.stages)
    return tuple(
        (
            Beside(
                f"stage {number}, forward", _of(told, lambda it: it.forward_seconds), measured.forward_seconds
            ),
            Beside(
                f"stage {number}, backward",
                _of(told, lambda it: it.input_grad_seconds + it.weight_grad_seconds),
                measured.whole_backward_seconds,
            ),
            Beside(
                f"stage {number}, input gradient",
                _of(told, lambda it: it.input_grad_seconds),
                measured.input_grad_seconds,
            ),
            Beside(
                f"stage {number}, weight gradient",
                _of(told, lambda it: it.weight_grad_seconds),
                measured.weight_grad_seconds,
            ),
        )
        for number, (told, measured) in enumerate(zip(stages, run.stages, strict=True))
    )


def _of(told: T | None, read: Callable[[T], float]) -> float | None:
    """A number of a plan's part; None where there is no plan."""
    return None if told is None else read(told)


def furthest(numbers: Iterable[Beside]) -> Beside | None:
    """The number whose two values are furthest apart (as they are, not as shares); None if all agree.

    >>> numbers = [Beside("a", 1.0, 2.0), Beside("b", 10.0, 12.0), Beside("c", None, 99.0)]
    >>> furthest(numbers).what
    'b'
    """
    return max(
        (each for each in numbers if each.difference > 0), key=lambda each: each.difference, default=None
    )
