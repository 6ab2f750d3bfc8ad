"""Critical path: the chain of ops that a step's makespan consists of. A shorter step needs a shorter chain.

It is found backwards from the op that ends last: each op started because its rank became free just then, or
because a value arrived just then. Where both are true the rank counts, as that is the shorter explanation.
"""

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Forward, InputGrad, parts
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Span, Timeline
from evenflow.rules import Result, dependencies, results


def critical_path(timeline: Timeline, schedule: Schedule, flow: Flow, costs: Costs) -> tuple[Span, ...]:
    """Return the chain of ops that ends last, in the order of time, each waiting for the one before it.

    `timeline` must be what `simulate` predicts for `schedule`, `flow` and `costs`. Time between two
    neighbours is a transfer's from the one to the other: latency, size, and what the link carried before.
    So the ops and the transfers together last as long as the makespan.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> schedule, costs = gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2), Costs.uniform(2)
    >>> timeline = simulate(schedule, Flow.chain(2), costs)
    >>> print(*(span.op for span in critical_path(timeline, schedule, Flow.chain(2), costs)))
    0F0 1F0 1F1 1B0 0B0 0B1
    """
    if not any(lane.ops for lane in timeline.lanes):
        return ()
    arrivals = _Arrivals(timeline, schedule, flow, costs)
    last = max(
        (rank for rank, lane in enumerate(timeline.lanes) if lane.ops),
        key=lambda rank: (timeline.lanes[rank].end_seconds[-1], -rank),
    )
    here: tuple[int, int] | None = (last, len(timeline.lanes[last].ops) - 1)
    path = []
    while here is not None:
        rank, at = here
        lane = timeline.lanes[rank]
        path.append(Span(rank, schedule.ranks[rank][at], lane.start_seconds[at], lane.end_seconds[at]))
        here = arrivals.cause(rank, at)
    return tuple(reversed(path))


class _Arrivals:
    """When each result that crosses ranks arrived, found link by link as it is asked for."""

    def __init__(self, timeline: Timeline, schedule: Schedule, flow: Flow, costs: Costs) -> None:
        self.lanes, self.schedule, self.flow, self.costs = timeline.lanes, schedule, flow, costs
        self.rank_of = schedule.placement.rank_of
        # Which stages take what a stage makes of microbatch 0, in the order in which the values leave.
        self.takers: dict[Result, list[int]] = {}
        for kind in (Forward, InputGrad):
            for stage in range(schedule.placement.num_stages):
                for result in dependencies(kind(stage, 0), flow):
                    self.takers.setdefault(result, []).append(stage)
        self._places: dict[int, dict[Result, int]] = {}
        self._links: dict[tuple[int, int], dict[tuple[Result, int], float]] = {}

    def cause(self, rank: int, at: int) -> tuple[int, int] | None:
        """Return the rank and place of the op that this one waited for last; None if it waited for none."""
        latest = self.lanes[rank].end_seconds[at - 1] if at else 0.0
        cause = (rank, at - 1) if at else None
        for part in parts(self.schedule.ranks[rank][at]):
            for result in dependencies(part, self.flow):
                source = self.rank_of[result.stage]
                if source == rank:
                    continue  # an earlier op of this queue
                arrival = self.link(source, rank)[result, part.stage]
                if arrival > latest or cause is None:
                    latest, cause = arrival, (source, self.places(source)[result])
        return cause

    def places(self, rank: int) -> dict[Result, int]:
        """Return the place in a rank's queue of the op that makes each result."""
        if rank not in self._places:
            queue = self.schedule.ranks[rank]
            self._places[rank] = {result: at for at, op in enumerate(queue) for result in results(op)}
        return self._places[rank]

    def link(self, source: int, target: int) -> dict[tuple[Result, int], float]:
        """Return when each result arrived in each stage, over the link from one rank to another."""
        if (source, target) not in self._links:
            link, free = self.costs.link_between(source, target), 0.0
            arrivals = {}
            for op, end in zip(self.schedule.ranks[source], self.lanes[source].end_seconds, strict=True):
                for result in results(op):
                    for stage in self.takers.get(type(result)(result.stage, 0), ()):
                        if self.rank_of[stage] == target:
                            num_bytes = self.costs.sent_bytes.get((result.stage, stage), 0.0)
                            free = max(free, end) + link.occupied_seconds(num_bytes)
                            arrivals[result, stage] = free + link.latency_seconds
            self._links[source, target] = arrivals
        return self._links[source, target]
