"""What the steps took: the measured timeline of the last, and what the simulator predicts for it."""

import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from evenflow.bill import Bill, Ran, bills, of_timeline
from evenflow.errors import ConfigError
from evenflow.graph.cutting.cut import Cut
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Op, SimpleOp, WeightGrad
from evenflow.ir.timeline import Span, Timeline
from evenflow.pipe.times.clock_offsets import clock_offset
from evenflow.rules import Result, dependencies, results
from evenflow.runtime.notes.log import Log
from evenflow.runtime.ranks.world import World
from evenflow.simulate import simulate
from evenflow.validate import ProvenProgram

KEPT_STEPS = 16


@dataclass(slots=True)
class Marks:
    """When a step began and ended in this process, and the seconds of its update."""

    start_seconds: float
    end_seconds: float = 0.0
    update_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Step:
    proven: ProvenProgram
    logs: Sequence[Log]
    marks: Marks
    cut: Cut  # of its first microbatch


@dataclass(frozen=True, slots=True)
class Last:
    """A step on all ranks, from `Times.last`.

    `rows`: each rank's ops, with the seconds at which it came to each, at which it started and ended.
    `held_bytes`: what was there after each, of the last step of the same program whose memory was looked at;
    empty where there was none. `cut`: that of the step's first microbatch.
    """

    predicted: Timeline
    measured: Timeline
    predicted_bills: tuple[Bill, ...]
    measured_bills: tuple[Bill, ...]
    rows: tuple[Sequence[tuple[Op, float, float, float]], ...]
    held_bytes: tuple[tuple[int, ...], ...]
    cut: Cut


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
        self._steps: deque[_Step] = deque(maxlen=KEPT_STEPS)
        self._gauged: _Step | None = None  # the last whose memory was looked at

    def note(self, proven: ProvenProgram, logs: Sequence[Log], marks: Marks, cut: Cut) -> None:
        """Keep what this process's ranks noted of a step, whose first microbatch was cut so."""
        self._steps.append(_Step(proven, logs, marks, cut))
        if logs[0].held_bytes:
            self._gauged = self._steps[-1]

    def computed(self) -> list[tuple[float, float]]:
        """(start, end) of what this process computed in its last step, in seconds on its own clock.

        Waits for a GPU, which may be behind the host, to come to the end of that.
        """
        return [each for log in self._steps[-1].logs for each in log.computed]

    def last(self, world: World) -> Last:
        """What the last step was, on all ranks; collective. Raises `ConfigError` before the first step.

        The timeline is predicted from the medians of the steps before: what ops compute, and what handing
        over takes with it; of the bills the schedule's and the stages' doing alone, as the simulator knows no
        transfers there. One process has one bill, in which its ranks take turns. Times of several hosts are
        moved to the first rank's clock (see `clock_offset`).
        """
        if not self._steps:
            raise ConfigError("no step has run yet: there is nothing to show")
        last, gauged, offset = self._steps[-1], self._gauged, clock_offset(world)
        held = gauged.logs if gauged is not None and gauged.proven is last.proven else None
        mine = [
            (_ran(log, last.marks, offset), [] if held is None else held[at].held_bytes)
            for at, log in enumerate(last.logs)
        ]
        gathered = world.gather((mine, self._parts_before()))
        lanes = [lane for ranks, _ in gathered for lane in ranks]
        costs = costs_of(self._num_stages, [span for _, earlier in gathered for span in earlier])
        flow, ran = last.proven.program.flow, [each for each, _ in lanes]
        simulated, balanced = (_simulated(last.proven, each, world) for each in (costs, _balanced(costs)))
        spans = [
            Span(rank, op, start, end) for rank, each in enumerate(ran) for op, _, start, end in each.ops
        ]
        return Last(
            predicted=self._predicted(costs, offset, world),
            measured=_from_first_op(last.proven, spans),
            predicted_bills=_bills(of_timeline(simulated), flow, balanced, world),
            measured_bills=_bills(ran, flow, balanced, world),
            rows=tuple(each.ops for each in ran),
            held_bytes=tuple(tuple(each) for _, each in lanes),
            cut=last.cut,
        )

    def _predicted(self, costs: Costs, offset: float, world: World) -> Timeline:
        """The last step, where ops compute for as long as `costs` say, and keep ranks as long as before."""
        proven, before = self._steps[-1].proven, self._before()
        if world.size == 1:  # the ranks take turns, so that none is free when its op has ended
            return _simulated(proven, costs, world)
        gathered = world.gather([[_ran(log, step.marks, offset) for log in step.logs] for step in before])
        kept = [
            span
            for step, ranks in zip(before, zip(*gathered, strict=True), strict=True)
            for span in occupied([ran for rank in ranks for ran in rank], step.proven.program.flow)
        ]
        if not all(isinstance(span.op, SimpleOp) for span in kept):  # which of two that overlap kept it?
            return _simulated(proven, costs, world)
        simulated = _simulated(proven, costs_of(self._num_stages, kept), world)
        spans = [
            replace(span, end_seconds=span.start_seconds + costs.seconds(span.op))
            for span in simulated.spans
            if isinstance(span.op, ComputeOp)
        ]
        return Timeline.of(proven.program.schedule.placement.num_ranks, spans)

    def _before(self) -> list[_Step]:
        """The steps before the last, or that if there was none."""
        return list(self._steps)[:-1] or list(self._steps)

    def _parts_before(self) -> list[Span]:
        """The simple ops of those."""
        return [part for step in self._before() for part in _parts(step.logs)]

    def measured(self, world: World, num_steps: int) -> Measured:
        """What the last steps took, at most so many of those kept; collective. Raises as `timelines` does."""
        if not self._steps:
            raise ConfigError("no step has run yet: there is nothing to measure")
        steps = list(self._steps)[-num_steps:]
        offset = clock_offset(world)
        gathered = world.gather([(_spans(step.logs, offset), _parts(step.logs)) for step in steps])
        timelines = [
            _from_first_op(step.proven, [span for rank in gathered for span in rank[at][0]])
            for at, step in enumerate(steps)
        ]
        parts = [span for rank in gathered for _, spans in rank for span in spans]
        found = _seconds_of(parts)
        costs = costs_of(self._num_stages, parts)
        return Measured(
            tuple(timelines),
            {key: statistics.median(seconds) for key, seconds in found.items()},
            _simulated(steps[-1].proven, costs, world),
        )


def occupied(ranks: Sequence[Ran], flow: Flow) -> list[Span]:
    """A span for each op that computes, from when its rank and its inputs were there until the rank was free.

    So long it keeps its rank: between lie the receiving, the computing and the sending. If each op takes just
    as long again, a simulation in which nothing else takes time gives each op's start.

    >>> from evenflow.ir.op import Forward, Payload, Recv, Send
    >>> sent = Send(0, 1, 0, Payload.ACTIVATION), Recv(0, 1, 0, Payload.ACTIVATION)
    >>> first = Ran([(Forward(0, 0), 0.0, 0.0, 2.0), (sent[0], 2.0, 2.0, 2.25)], 0.0, 2.25)
    >>> second = Ran([(sent[1], 0.0, 0.0, 0.0), (Forward(1, 0), 0.0, 2.5, 4.0)], 0.0, 4.0)
    >>> [(span.start_seconds, span.end_seconds) for span in occupied([first, second], Flow.chain(2))]
    [(0.0, 2.25), (2.25, 4.0)]
    """
    computed = [list(_computed(ran)) for ran in ranks]
    made: dict[Result, float] = {}
    for ops in computed:
        for op, _, _, free in ops:
            made.update(dict.fromkeys(results(op), free))
    return [
        # A value may be taken before the rank that has sent it is free.
        Span(rank, op, min(max([began, *(made[each] for each in dependencies(op, flow))]), started), free)
        for rank, ops in enumerate(computed)
        for op, began, started, free in ops
    ]


def _computed(ran: Ran) -> Iterator[tuple[ComputeOp, float, float, float]]:
    """Each op that computes: when its rank came to it, when it started, when the rank came to the next."""
    computing = [(op, began, started) for op, began, started, _ in ran.ops if isinstance(op, ComputeOp)]
    came = [began for _, began, _ in computing[1:]]
    for (op, began, started), free in zip(computing, [*came, ran.ops[-1][-1]], strict=True):
        yield op, began, started, free


def _spans(logs: Sequence[Log], offset: float) -> list[Span]:
    """What this process's ranks ran, on the first rank's clock; its own is `offset` seconds ahead of that."""
    spans = (span for log in logs for span in log.spans())
    return [Span(s.rank, s.op, s.start_seconds - offset, s.end_seconds - offset) for s in spans]


def _parts(logs: Sequence[Log]) -> list[Span]:
    return [span for log in logs for span in log.parts()]


def _ran(log: Log, marks: Marks, offset: float) -> Ran:
    pairs = zip(log.lines, log.times(), strict=True)
    ops = [(line.op, began - offset, start - offset, end - offset) for line, (began, start, end) in pairs]
    # A GPU may still be at work when the host has gone on.
    end = max([marks.end_seconds - offset, *(op[-1] for op in ops)])
    return Ran(ops, marks.start_seconds - offset, end, marks.update_seconds)


def _bills(ranks: Sequence[Ran], flow: Flow, balanced: Timeline, world: World) -> tuple[Bill, ...]:
    if world.size > 1:
        return bills(ranks, flow, balanced)
    ops = sorted((op for ran in ranks for op in ran.ops), key=itemgetter(2))
    turns = [(op, start, start, end) for op, _, start, end in ops]  # nobody waits
    alone = Ran(turns, ranks[0].start_seconds, max(ran.end_seconds for ran in ranks), ranks[0].update_seconds)
    return bills([alone], flow, Timeline.of(1, []))


def _balanced(costs: Costs) -> Costs:
    """Costs of as many stages that all take the mean, each on its rank."""
    number = costs.num_stages
    means = (
        statistics.fmean(each)
        for each in (costs.forward_seconds, costs.input_grad_seconds, costs.weight_grad_seconds)
    )
    return Costs.uniform(number, *means)


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
