"""Timeline: what ran when, on which rank. The simulator predicts one and the tracer measures one.

Two measures of time, never mixed: the *makespan* is the whole step's, from the first start to the last end
over all ranks; the *span* is one rank's busy window, from its own first start to its own last end, and a
timeline's span is its longest rank's. Both look at compute only: a transfer that waits is not work.
"""

import statistics
from dataclasses import dataclass

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, Forward, Op


@dataclass(frozen=True, slots=True)
class Span:
    """One op on one rank, from its start to its end, in seconds since the step began.

    >>> Span(rank=0, op=Forward(0, 0), start_seconds=1.0, end_seconds=1.5).seconds
    0.5
    """

    rank: int
    op: Op
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """How long the op took."""
        return self.end_seconds - self.start_seconds

    @property
    def is_compute(self) -> bool:
        """Whether the op computes, rather than moves a value."""
        return isinstance(self.op, Forward | Backward)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step on `num_ranks` ranks, transfers included where they were measured.

    >>> timeline = Timeline(2, (Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 3.0)))
    >>> timeline.makespan_seconds, timeline.span_seconds, timeline.busy_seconds(0), timeline.bubble
    (3.0, 2.0, 1.0, 0.5)
    """

    num_ranks: int
    spans: tuple[Span, ...]

    @property
    def makespan_seconds(self) -> float:
        """Seconds from the first start to the last end of any compute op on any rank; 0 if none ran."""
        return _window_seconds([span for span in self.spans if span.is_compute])

    @property
    def span_seconds(self) -> float:
        """Seconds of the longest rank's busy window, from its own first start to its own last end."""
        return max(_window_seconds(self.compute_on(rank)) for rank in range(self.num_ranks))

    @property
    def bubble(self) -> float:
        """The idle share of the step, 0 to 1: 1 - (mean busy seconds of a rank) / makespan; 0 if none ran.

        It is measured against the *makespan*, so the wait of the last rank for its first microbatch
        counts. For p equal ranks and m microbatches, GPipe and 1F1B have (p - 1) / (m + p - 1).
        """
        makespan = self.makespan_seconds
        if makespan == 0:
            return 0.0
        busy = sum(span.seconds for span in self.spans if span.is_compute)
        return 1 - busy / self.num_ranks / makespan

    def compute_on(self, rank: int) -> list[Span]:
        """Return the compute spans of one rank, in the timeline's order.

        >>> Timeline(1, (Span(0, Forward(0, 0), 0.0, 1.0),)).compute_on(0)[0].op
        Forward(stage=0, microbatch=0)
        """
        return [span for span in self.spans if span.rank == rank and span.is_compute]

    def busy_seconds(self, rank: int) -> float:
        """Return the seconds that one rank spent in compute ops.

        >>> Timeline(1, (Span(0, Forward(0, 0), 0.0, 1.0), Span(0, Backward(0, 0), 4.0, 6.0))).busy_seconds(0)
        3.0
        """
        return sum(span.seconds for span in self.compute_on(rank))

    def median_seconds(self, kind: type[Forward] | type[Backward], stage: int) -> float:
        """Return the median seconds of one stage's forwards or backwards; `ConfigError` if none ran.

        >>> Timeline(1, (Span(0, Forward(0, 0), 0.0, 1.0),)).median_seconds(Forward, stage=0)
        1.0
        """
        seconds = [
            span.seconds for span in self.spans if isinstance(span.op, kind) and span.op.stage == stage
        ]
        if not seconds:
            raise ConfigError(f"the timeline holds no {kind.__name__} of stage {stage}")
        return statistics.median(seconds)


def _window_seconds(spans: list[Span]) -> float:
    if not spans:
        return 0.0
    return max(span.end_seconds for span in spans) - min(span.start_seconds for span in spans)
