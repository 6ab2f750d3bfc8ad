"""Timeline: what ran when, on which rank. The simulator predicts one and the tracer measures one.

Two measures of time, never mixed: the *makespan* is the whole step's, from the first start to the last end
over all ranks; the *span* is one rank's busy window, from its own first start to its own last end, and a
timeline's span is its longest rank's. Both look at compute only: a transfer that waits is not work.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, TypeAlias

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Op, WeightGrad

Objective: TypeAlias = Literal["span", "makespan"]


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
        return isinstance(self.op, ComputeOp)


@dataclass(frozen=True, slots=True)
class Lane:
    """One rank's ops in the order in which they started, with their starts and ends in seconds.

    Columns and not a row of `Span`s, because a schedule may hold hundreds of thousands of ops and most
    questions look at their times alone.

    >>> Lane((Forward(0, 0), Backward(0, 0)), (0.0, 4.0), (1.0, 6.0)).busy_seconds
    3.0
    """

    ops: Sequence[Op]
    start_seconds: Sequence[float]
    end_seconds: Sequence[float]
    _computes: tuple[int, ...] | range = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if all(issubclass(kind, ComputeOp) for kind in set(map(type, self.ops))):
            computes: tuple[int, ...] | range = range(len(self.ops))
        else:
            computes = tuple(at for at, op in enumerate(self.ops) if isinstance(op, ComputeOp))
        object.__setattr__(self, "_computes", computes)

    @property
    def window_seconds(self) -> tuple[float, float] | None:
        """The first start and the last end of its compute ops; None if none ran."""
        if not self._computes:
            return None
        starts, ends = self.start_seconds, self.end_seconds
        return min(starts[at] for at in self._computes), max(ends[at] for at in self._computes)

    @property
    def busy_seconds(self) -> float:
        """Seconds spent in compute ops."""
        starts, ends = self.start_seconds, self.end_seconds
        return sum(ends[at] - starts[at] for at in self._computes)

    def spans(self, rank: int) -> Iterator[Span]:
        """Yield every op as a `Span` of that rank."""
        for op, start, end in zip(self.ops, self.start_seconds, self.end_seconds, strict=True):
            yield Span(rank, op, start, end)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What each rank did in one step: a lane for each, transfers included where they were measured.

    >>> timeline = Timeline.of(2, [Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 3.0)])
    >>> timeline.makespan_seconds, timeline.span_seconds, timeline.busy_seconds(0), timeline.bubble
    (3.0, 2.0, 1.0, 0.5)
    """

    lanes: tuple[Lane, ...]

    @staticmethod
    def of(num_ranks: int, spans: Iterable[Span]) -> "Timeline":
        """Return the timeline of these spans, which may come in any order.

        >>> Timeline.of(1, [Span(0, Forward(0, 0), 0.0, 1.0)]).num_ranks
        1
        """
        lanes: list[list[Span]] = [[] for _ in range(num_ranks)]
        for span in sorted(spans, key=attrgetter("start_seconds")):
            lanes[span.rank].append(span)
        return Timeline(
            tuple(
                Lane(
                    tuple(span.op for span in lane),
                    tuple(span.start_seconds for span in lane),
                    tuple(span.end_seconds for span in lane),
                )
                for lane in lanes
            )
        )

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.lanes)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Every op of every rank, in the order of their starts. Made anew at each call."""
        every = [span for rank, lane in enumerate(self.lanes) for span in lane.spans(rank)]
        return tuple(sorted(every, key=attrgetter("start_seconds")))

    @property
    def makespan_seconds(self) -> float:
        """Seconds from the first start to the last end of any compute op on any rank; 0 if none ran."""
        windows = [lane.window_seconds for lane in self.lanes]
        ran = [window for window in windows if window is not None]
        return max(end for _, end in ran) - min(start for start, _ in ran) if ran else 0.0

    @property
    def span_seconds(self) -> float:
        """Seconds of the longest rank's busy window, from its own first start to its own last end."""
        windows = [lane.window_seconds or (0.0, 0.0) for lane in self.lanes]
        return max(end - start for start, end in windows)

    @property
    def bubble(self) -> float:
        """The idle share of the step, 0 to 1: 1 - (mean busy seconds of a rank) / makespan; 0 if none ran.

        It is measured against the *makespan*, so the wait of the last rank for its first microbatch
        counts. For p equal ranks and m microbatches, GPipe and 1F1B have (p - 1) / (m + p - 1).
        """
        makespan = self.makespan_seconds
        if makespan == 0:
            return 0.0
        return 1 - sum(lane.busy_seconds for lane in self.lanes) / self.num_ranks / makespan

    @property
    def span_bubble(self) -> float:
        """The idle share of the longest busy window, 0 to 1: 1 - (most busy seconds of a rank) / span.

        With no barrier at a step's end, the next step fills what the window leaves free; this is the rate
        that steady training then has. Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024.

        >>> Timeline.of(1, [Span(0, Forward(0, 0), 0, 1), Span(0, Backward(0, 0), 2, 4)]).span_bubble
        0.25
        """
        span = self.span_seconds
        return 1 - max(lane.busy_seconds for lane in self.lanes) / span if span > 0 else 0.0

    def compute_on(self, rank: int) -> list[Span]:
        """Return the compute spans of one rank, in the order of their starts.

        >>> Timeline.of(1, [Span(0, Forward(0, 0), 0.0, 1.0)]).compute_on(0)[0].op
        Forward(stage=0, microbatch=0)
        """
        return [span for span in self.lanes[rank].spans(rank) if span.is_compute]

    def busy_seconds(self, rank: int) -> float:
        """Return the seconds that one rank spent in compute ops.

        >>> spans = [Span(0, Forward(0, 0), 0.0, 1.0), Span(0, Backward(0, 0), 4.0, 6.0)]
        >>> Timeline.of(1, spans).busy_seconds(0)
        3.0
        """
        return self.lanes[rank].busy_seconds

    def idle_seconds(self, rank: int) -> float:
        """Return the seconds of the makespan in which one rank computed nothing.

        >>> spans = [Span(0, Forward(0, 0), 0.0, 1.0), Span(1, Forward(1, 0), 1.0, 3.0)]
        >>> Timeline.of(2, spans).idle_seconds(0)
        2.0
        """
        return self.makespan_seconds - self.busy_seconds(rank)

    def median_seconds(
        self, kind: type[Forward] | type[Backward] | type[InputGrad] | type[WeightGrad], stage: int
    ) -> float:
        """Return the median seconds of one stage's ops of a kind; `ConfigError` if none ran.

        >>> Timeline.of(1, [Span(0, Forward(0, 0), 0.0, 1.0)]).median_seconds(Forward, stage=0)
        1.0
        """
        seconds = [
            end - start
            for lane in self.lanes
            for op, start, end in zip(lane.ops, lane.start_seconds, lane.end_seconds, strict=True)
            if isinstance(op, kind) and op.stage == stage
        ]
        if not seconds:
            raise ConfigError(f"the timeline holds no {kind.__name__} of stage {stage}")
        return statistics.median(seconds)
