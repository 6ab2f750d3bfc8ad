"""Hypothesis strategies: random chains of any placement and costs, and orders that can run.

Seconds are sums of powers of 2, so that floating point adds them exactly; links have any bandwidth, because
the search leaves it to the simulator that two transfers meet on one.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from brute_force import is_complete, peaks, times
from evenflow.bounds import Instance, instance_of
from evenflow.ir import Costs, Flow, Link, Placement, Schedule
from evenflow.memory import memory_faults
from evenflow.search.tables import Order, tables_of
from evenflow.search.timing import INFEASIBLE, Reading, copy_trace, run, trace_for
from evenflow.search.translate import schedule_of

SECONDS = (0.0, 0.25, 0.5, 1.0, 2.0, 7.5)
BYTES = (0.0, 0.5, 1.0, 3.0)


@dataclass(frozen=True)
class Case:
    """What is to be scheduled, in the project's own nouns and as the search takes it."""

    placement: Placement
    costs: Costs
    num_microbatches: int

    @property
    def flow(self) -> Flow:
        return Flow.chain(self.placement.num_stages)

    @cached_property
    def instance(self) -> Instance:
        return instance_of(self.placement, self.num_microbatches, self.costs)

    def schedule(self, order: Order) -> Schedule:
        return schedule_of(order, self.placement, self.num_microbatches, "tried")

    def capped(self, caps: tuple[float, ...]) -> "Case":
        return replace(self, costs=replace(self.costs, memory_caps=caps))


@st.composite
def cases(draw: st.DrawFn, *, most_microbatches: int = 5) -> Case:
    """Without caps."""
    num_ranks = draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, num_ranks - 1), max_size=4))
    placement = Placement(tuple(draw(st.permutations([*range(num_ranks), *extra]))))
    num_stages = placement.num_stages

    def per_stage(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), min_size=num_stages, max_size=num_stages)))

    links = st.builds(Link, st.sampled_from(SECONDS))
    ranks = st.integers(0, num_ranks - 1)
    held = per_stage(BYTES)
    costs = Costs(
        per_stage(SECONDS),
        per_stage(SECONDS),
        per_stage(SECONDS),
        link=draw(links),
        links=draw(st.dictionaries(st.tuples(ranks, ranks), links, max_size=3)),
        activation_bytes=held,
        weight_grad_bytes=tuple(draw(st.sampled_from([0.0, 0.5, 1.0])) * each for each in held),
    )
    return Case(placement, costs, draw(st.integers(1, most_microbatches)))


def equal(rank_of: Iterable[int], *, num_microbatches: int, cap: float, latency: float = 0.0) -> Instance:
    """F, I and W of all stages of a rank take 1 second and 1 unit of memory; `cap` is in that unit."""
    placement = Placement(tuple(rank_of))
    each = (1.0,) * placement.num_ranks
    caps = (cap,) * placement.num_ranks
    costs = Costs.of_ranks(placement, each, each, each, latency_seconds=latency, memory_caps=caps)
    return instance_of(placement, num_microbatches, costs)


def random_order(case: Case, chosen: random.Random) -> Order:
    """A strict order that can run where no cap limits it: any op that has all it needs, again and again."""
    num = case.placement.num_stages
    needs = [[source for source, target in case.flow.activations if target == stage] for stage in range(num)]
    needs += [
        [stage, *(num + source for source, target in case.flow.gradients if target == stage)]
        for stage in range(num)
    ]
    needs += [[num + stage] for stage in range(num)]
    done = [0] * (3 * num)
    queues: list[list[int]] = [[] for _ in range(case.placement.num_ranks)]
    wish = [chosen.random() for _ in done]  # what kind of order it is, so that not all are alike
    while True:
        can = [
            letter
            for letter in range(3 * num)
            if done[letter] < case.num_microbatches
            and all(done[source] > done[letter] for source in needs[letter])
        ]
        if not can:
            return tuple(map(tuple, queues))
        (letter,) = chosen.choices(can, [wish[letter] ** 3 + 0.01 for letter in can])
        queues[case.placement.rank_of[letter % num]].append(letter)
        done[letter] += 1


def strings(order: Order) -> tuple[np.ndarray, np.ndarray]:
    """The arrays that the kernels read."""
    lengths = np.array([len(queue) for queue in order], np.int64)
    wide = np.zeros((len(order), 2 * max(lengths)), np.int16)  # with room for hints
    for rank, queue in enumerate(order):
        wide[rank, : len(queue)] = queue
    return wide, lengths


def order_from(letters: np.ndarray, lengths: np.ndarray) -> Order:
    return tuple(tuple(map(int, row[:length])) for row, length in zip(letters, lengths, strict=True))


def cost_of(
    instance: Instance, order: Order, objective, reading: Reading, limit: float = INFEASIBLE
) -> tuple[float, Order]:
    """What an order costs, and the strict order of what it did; an empty one where it can't run."""
    tables = tables_of(instance, objective)
    trace = trace_for(tables)
    cost = run(tables, trace, *strings(order), reading, limit)
    if cost >= INFEASIBLE:
        return math.inf, ()
    letters, lengths = np.zeros_like(trace.letters), np.zeros(instance.placement.num_ranks, np.int64)
    copy_trace(trace, letters, lengths)
    return cost, order_from(letters, lengths)


STRICT = Reading(False, 1.0, 0.0)


def exact_excess(case: Case, order: Order, objective) -> float:
    """The same by the exact checker: `inf` at a standstill and over a cap."""
    schedule = case.schedule(order)
    assert is_complete(schedule)
    lanes = times(schedule, case.flow, case.costs)
    caps = case.costs.memory_caps or (math.inf,) * case.placement.num_ranks
    if lanes is None or any(peak > cap for peak, cap in zip(peaks(schedule, case.costs), caps, strict=True)):
        return math.inf
    work = case.costs.work_seconds(case.placement, case.num_microbatches, trains=True)
    begins = [0 if objective == "makespan" else lane[0][0] for lane in lanes]
    return float(max(lane[-1][1] - begin for lane, begin in zip(lanes, begins, strict=True))) - max(work)


def capped(case: Case, chosen: random.Random) -> Case:
    """With caps between the largest stage of a rank and two microbatches, or none."""
    held, caps = case.costs.activation_bytes, []
    for rank in range(case.placement.num_ranks):
        sizes = [held[stage] for stage in case.placement.stages_on(rank)]
        caps.append(chosen.choice([max(sizes), sum(sizes), 2 * sum(sizes), math.inf]))
    return case.capped(tuple(caps))


def check(case: Case, order: Order, excess: float, objective) -> None:
    """A strict order is complete, fits the caps, and takes as long as is said."""
    assert is_complete(case.schedule(order))
    assert memory_faults(case.schedule(order), case.costs) == []
    assert excess == exact_excess(case, order, objective)
