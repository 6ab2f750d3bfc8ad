"""Hypothesis strategies: random flows with skips and relays, on random sizes of every schedule."""

from dataclasses import dataclass

from hypothesis import strategies as st

from evenflow.ir import Costs, Flow, Schedule
from evenflow.schedules.catalog import SCHEDULES


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


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    name = draw(st.sampled_from(list(SCHEDULES)))
    stages_per_rank = 1 if name == "1f1b" else draw(st.integers(1, 3))
    schedule = SCHEDULES[name](draw(st.integers(1, 5)), stages_per_rank, draw(st.integers(1, 7)))
    num_stages = schedule.placement.num_stages
    # Zero is drawn on purpose: ops without length are where an order by time alone goes wrong.
    seconds = st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.0, 7.5])
    per_stage = st.lists(seconds, min_size=num_stages, max_size=num_stages).map(tuple)
    costs = Costs(draw(per_stage), draw(per_stage), draw(seconds))
    return Pipeline(schedule, draw(flows(num_stages)), costs)
