"""What the steps took: the measured timeline of the last, and what the simulator predicts for it."""

import statistics
from collections import deque
from collections.abc import Sequence

from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs
from evenflow.ir.op import Backward, Forward
from evenflow.ir.timeline import Span, Timeline
from evenflow.runtime.world import World
from evenflow.simulate import simulate
from evenflow.validate import ProvenProgram

KEPT_STEPS = 16


class Times:
    """Keeps this process's spans of the last steps."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._steps: deque[tuple[ProvenProgram, list[Span]]] = deque(maxlen=KEPT_STEPS)

    def note(self, proven: ProvenProgram, spans: list[Span]) -> None:
        """Keep a step's spans."""
        self._steps.append((proven, spans))

    def timelines(self, world: World) -> tuple[Timeline, Timeline]:
        """(predicted, measured) for the last step; collective. Raises `ConfigError` before the first step.

        On one host all ranks read the same clock, so their spans need no alignment.
        """
        if not self._steps:
            raise ConfigError("no step has run yet: there is no timeline to show")
        proven, spans = self._steps[-1]
        before = list(self._steps)[:-1] or [self._steps[-1]]
        mine = (spans, [span for _, earlier in before for span in earlier if span.is_compute])
        gathered = world.gather(mine)
        measured = [span for last, _ in gathered for span in last]
        costs = self._costs([span for _, earlier in gathered for span in earlier])
        start = min(span.start_seconds for span in measured if span.is_compute)
        moved = [Span(s.rank, s.op, s.start_seconds - start, s.end_seconds - start) for s in measured]
        num_ranks = proven.program.schedule.placement.num_ranks
        predicted = (
            simulate(proven.program.schedule, proven.program.flow, costs)
            if world.size > 1
            else _serial(proven, costs)
        )
        return predicted, Timeline.of(num_ranks, moved)

    def _costs(self, spans: Sequence[Span]) -> Costs:
        def median(kind: type[Forward] | type[Backward], stage: int) -> float:
            found = [s.seconds for s in spans if isinstance(s.op, kind) and s.op.stage == stage]
            return statistics.median(found) if found else 0.0

        stages = range(self._num_stages)
        # Every backward is whole here: where its seconds are counted changes nothing.
        backwards = tuple(median(Backward, s) for s in stages)
        return Costs(tuple(median(Forward, s) for s in stages), backwards, (0.0,) * self._num_stages)


def _serial(proven: ProvenProgram, costs: Costs) -> Timeline:
    """All ranks in one process: they take turns in the proven order."""
    spans, now = [], 0.0
    for rank, op in proven.order:
        if isinstance(op, Forward | Backward):
            spans.append(Span(rank, op, now, now + costs.seconds(op)))
            now = spans[-1].end_seconds
    return Timeline.of(proven.program.schedule.placement.num_ranks, spans)
