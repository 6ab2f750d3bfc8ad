"""Hypothesis strategies: random flows with skips and relays, on random sizes of every schedule.

Some schedules are rewritten: whole backwards split, and a neighbouring pair of ops fused into an overlap.
"""

import math
import random
from dataclasses import dataclass, replace

from hypothesis import reject
from hypothesis import strategies as st

from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Backward, ComputeOp, Costs, Flow, InputGrad, Link, Overlap, Schedule, WeightGrad
from evenflow.rules import dependencies, results
from evenflow.schedules.catalog import SCHEDULES
from evenflow.simulate import simulate


@dataclass(frozen=True, slots=True)
class Pipeline:
    schedule: Schedule
    flow: Flow
    costs: Costs


def flow_of_values(values: list[list[int]]) -> Flow:
    """Each value is its producer's stage and then its consumers', ascending."""
    activations, gradients = set(), set()
    for producer, *consumers in values:
        activations |= {(producer, consumer) for consumer in consumers}
        relay = [producer, *consumers]
        gradients |= set(zip(relay[1:], relay[:-1], strict=True))
    return Flow(frozenset(activations), frozenset(gradients))


@st.composite
def flows(draw: st.DrawFn, num_stages: int) -> Flow:
    chain = [[stage, stage + 1] for stage in range(num_stages - 1)]
    if num_stages < 3:
        return flow_of_values(chain)
    value = st.sets(st.integers(0, num_stages - 1), min_size=2).map(sorted)
    return flow_of_values(chain + draw(st.lists(value, max_size=4)))


def split_backwards(schedule: Schedule) -> Schedule:
    """Every whole backward in two parts, the weight gradients last."""
    ranks = []
    for queue in schedule.ranks:
        whole = [op for op in queue if isinstance(op, Backward)]
        now = [InputGrad(op.stage, op.microbatch) if isinstance(op, Backward) else op for op in queue]
        ranks.append((*now, *(WeightGrad(op.stage, op.microbatch) for op in whole)))
    return replace(schedule, name=f"{schedule.name}, split", ranks=tuple(ranks))


def fuse(schedule: Schedule, flow: Flow, chosen: random.Random) -> Schedule:
    """Some neighbours as overlaps, where neither waits for the other and the schedule still runs."""
    ranks = []
    for queue in schedule.ranks:
        now: list[ComputeOp] = []
        for op in queue:
            last = now[-1] if now else None
            if (
                last is not None
                and not isinstance(last, Overlap)
                and not isinstance(op, Overlap)
                and chosen.random() < 0.3
                and set(results(last)).isdisjoint(dependencies(op, flow))
            ):
                now[-1] = Overlap(last, op)
            else:
                now.append(op)
        ranks.append(tuple(now))
    fused = replace(schedule, name=f"{schedule.name}, fused", ranks=tuple(ranks))
    try:
        simulate(fused, flow, Costs.uniform(fused.placement.num_stages))
    except ScheduleError:
        return schedule  # two overlaps that wait for one another's halves
    return fused


@st.composite
def all_costs(draw: st.DrawFn, schedule: Schedule, flow: Flow) -> Costs:
    num_stages, num_ranks = schedule.placement.num_stages, schedule.placement.num_ranks
    # Zero is drawn on purpose: ops without length are where an order by time alone goes wrong.
    seconds = st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.0, 7.5])
    links = st.builds(Link, seconds, st.sampled_from([0.5, 3.0, math.inf]))
    ranks = st.integers(0, num_ranks - 1)

    def per_stage() -> tuple[float, ...]:
        return draw(st.lists(seconds, min_size=num_stages, max_size=num_stages).map(tuple))

    held = per_stage()
    return Costs(
        per_stage(),
        per_stage(),
        per_stage(),
        link=draw(links),
        links=draw(st.dictionaries(st.tuples(ranks, ranks), links, max_size=3)),
        sent_bytes={edge: draw(seconds) for edge in sorted(flow.activations | flow.gradients)},
        activation_bytes=held,
        weight_grad_bytes=tuple(draw(st.sampled_from([0.0, 0.5, 1.0])) * each for each in held),
        overlap_share=draw(st.sampled_from([0.5, 0.8, 1.0])),
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    name = draw(st.sampled_from(list(SCHEDULES)))
    stages_per_rank = draw(st.integers(1, 3))
    try:
        schedule = SCHEDULES[name](draw(st.integers(1, 5)), stages_per_rank, draw(st.integers(1, 7)))
    except ConfigError:
        reject()  # a method without schedules of these sizes
    flow = draw(flows(schedule.placement.num_stages))
    if draw(st.booleans()):
        schedule = split_backwards(schedule)
    if draw(st.booleans()):
        schedule = fuse(schedule, flow, random.Random(draw(st.integers(0, 2**16))))
    return Pipeline(schedule, flow, draw(all_costs(schedule, flow)))
