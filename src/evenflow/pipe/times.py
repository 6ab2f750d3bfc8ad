"""What the steps took: the measured timeline of the last, and what the simulator predicts for it."""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, SimpleOp, WeightGrad
from evenflow.ir.timeline import Span, Timeline
from evenflow.runtime.executor import Log
from evenflow.runtime.world import World
from evenflow.simulate import simulate
from evenflow.validate import ProvenProgram

KEPT_STEPS = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What some steps took: the timeline of each, over all ranks, and the median seconds of each stage's ops.

    `simulated` is what the simulator makes of those medians: it knows no transfers and no overhead.
    """

    timelines: tuple[Timeline, ...]
    op_seconds: Mapping[tuple[type[SimpleOp], int], float]
    simulated: Timeline

    def seconds(self, kind: type[SimpleOp], stage: int) -> float | None:
        """The median seconds of a stage's ops of a kind; None where it ran none."""
        return self.op_seconds.get((kind, stage))


class Times:
    """Keeps this process's spans of the last steps."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._steps: deque[tuple[ProvenProgram, Sequence[Log]]] = deque(maxlen=KEPT_STEPS)

    def note(self, proven: ProvenProgram, logs: Sequence[Log]) -> None:
        """Keep what this process's ranks noted of a step."""
        self._steps.append((proven, logs))

    def timelines(self, world: World) -> tuple[Timeline, Timeline]:
        """(predicted, measured) for the last step; collective. Raises `ConfigError` before the first step.

        On one host all ranks read the same clock, so their spans need no alignment.
        """
        if not self._steps:
            raise ConfigError("no step has run yet: there is no timeline to show")
        proven, logs = self._steps[-1]
        before = list(self._steps)[:-1] or [self._steps[-1]]
        gathered = world.gather((_spans(logs), [part for _, earlier in before for part in _parts(earlier)]))
        measured = [span for last, _ in gathered for span in last]
        costs = costs_of(self._num_stages, [span for _, earlier in gathered for span in earlier])
        return _simulated(proven, costs, world), _from_first_op(proven, measured)

    def measured(self, world: World, num_steps: int) -> Measured:
        """What the last steps took, at most so many of those kept; collective. Raises as `timelines` does."""
        if not self._steps:
            raise ConfigError("no step has run yet: there is nothing to measure")
        steps = list(self._steps)[-num_steps:]
        gathered = world.gather([(_spans(logs), _parts(logs)) for _, logs in steps])
        timelines = [
            _from_first_op(proven, [span for rank in gathered for span in rank[at][0]])
            for at, (proven, _) in enumerate(steps)
        ]
        parts = [span for rank in gathered for _, spans in rank for span in spans]
        found = _seconds_of(parts)
        costs = costs_of(self._num_stages, parts)
        return Measured(
            tuple(timelines),
            {key: statistics.median(seconds) for key, seconds in found.items()},
            _simulated(steps[-1][0], costs, world),
        )


def _spans(logs: Sequence[Log]) -> list[Span]:
    return [span for log in logs for span in log.spans()]


def _parts(logs: Sequence[Log]) -> list[Span]:
    return [span for log in logs for span in log.parts()]


def _from_first_op(proven: ProvenProgram, spans: Sequence[Span]) -> Timeline:
    start = min(span.start_seconds for span in spans if span.is_compute)
    moved = [Span(s.rank, s.op, s.start_seconds - start, s.end_seconds - start) for s in spans]
    return Timeline.of(proven.program.schedule.placement.num_ranks, moved)


def _simulated(proven: ProvenProgram, costs: Costs, world: World) -> Timeline:
    if world.size == 1:
        return _serial(proven, costs)
    return simulate(proven.program.schedule, proven.program.flow, costs)


def _seconds_of(spans: Sequence[Span]) -> dict[tuple[type[SimpleOp], int], list[float]]:
    """What the simple ops took, by kind and stage."""
    found: dict[tuple[type[SimpleOp], int], list[float]] = {}
    for span in spans:
        assert isinstance(span.op, SimpleOp), f"{span.op} is not a simple op"
        found.setdefault((type(span.op), span.op.stage), []).append(span.seconds)
    return found


def costs_of(num_stages: int, spans: Sequence[Span]) -> Costs:
    """Return what each stage's simple ops took, by their medians.

    Costs know a whole backward as the sum of its two parts. Where a stage ran both forms, which need not
    agree, the parts keep their ratio, and are scaled so that all its backwards together take what they took.

    >>> spans = [
    ...     Span(0, Forward(0, 0), 0, 1),
    ...     Span(0, InputGrad(0, 0), 1, 2),
    ...     Span(0, WeightGrad(0, 0), 2, 5),
    ... ]
    >>> costs = costs_of(1, [*spans, Span(0, Forward(0, 1), 5, 6), Span(0, Backward(0, 1), 6, 8)])
    >>> costs.forward_seconds, costs.input_grad_seconds, costs.weight_grad_seconds
    ((1.0,), (0.75,), (2.25,))
    """
    found = _seconds_of(spans)

    def median(kind: type[SimpleOp], stage: int) -> float:
        return statistics.median(found.get((kind, stage), (0.0,)))

    def backward(stage: int) -> tuple[float, float]:
        whole, first, second = (median(kind, stage) for kind in (Backward, InputGrad, WeightGrad))
        num_whole, num_split = (len(found.get((kind, stage), ())) for kind in (Backward, InputGrad))
        if num_split == 0 or first + second == 0:
            return whole, 0.0  # where the seconds of whole backwards are counted changes nothing
        mean = (num_whole * whole + num_split * (first + second)) / (num_whole + num_split)
        return mean * first / (first + second), mean * second / (first + second)

    backwards = [backward(stage) for stage in range(num_stages)]
    return Costs(
        tuple(median(Forward, stage) for stage in range(num_stages)),
        tuple(first for first, _ in backwards),
        tuple(second for _, second in backwards),
    )


def _serial(proven: ProvenProgram, costs: Costs) -> Timeline:
    """All ranks in one process: they take turns in the proven order."""
    spans, now = [], 0.0
    for rank, op in proven.order:
        if isinstance(op, ComputeOp):
            spans.append(Span(rank, op, now, now + costs.seconds(op)))
            now = spans[-1].end_seconds
    return Timeline.of(proven.program.schedule.placement.num_ranks, spans)
