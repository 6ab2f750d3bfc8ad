"""Whatever a merge's rounds and leads are, its order is complete and fits the caps."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import Case, capped, cases, check, cost_of, equal, order_from

from evenflow.schedules.catalog import get
from evenflow.search.merge import Merge, merged, merges, varied
from evenflow.search.timing import Reading
from evenflow.search.translate import order_of

SOME = settings(derandomize=True, deadline=None, max_examples=30)
objectives = st.sampled_from(["span", "makespan"])
seeds = st.integers(0, 2**32).map(random.Random)


def counted(order, case: Case) -> None:
    """Each forward and input gradient once for each microbatch, on its rank, and nothing else."""
    num = case.placement.num_stages
    for rank, queue in enumerate(order):
        stages = case.placement.stages_on(rank)
        wanted = [*stages, *(num + stage for stage in stages)] * case.num_microbatches
        assert sorted(queue) == sorted(wanted)


def timed_merge(case: Case, merge: Merge, objective) -> None:
    letters, lengths = merged(case.instance, merge)
    order = order_from(letters, lengths)
    counted(order, case)
    excess, strict = cost_of(case.instance, order, objective, Reading(True, merge.fill, 0.0))
    if strict:
        check(case, strict, excess, objective)


@SOME
@given(cases(), seeds, objectives)
def test_any_merge_and_all_its_variations_are_complete_and_fit(case, chosen, objective) -> None:
    case = capped(case, chosen)
    rounds = tuple(chosen.randint(1, 6) for _ in range(chosen.randint(1, 3)))
    lead = np.array([chosen.randint(-2, 12) for _ in range(case.placement.num_ranks)])
    merge = Merge(rounds, lead, chosen.choice([0.0, 0.5, 1.0]))
    for _ in range(4):
        before = (merge.rounds, merge.warmups.copy(), merge.fill)
        timed_merge(case, merge, objective)
        changed = varied(merge, chosen)
        assert (merge.rounds, merge.fill) == (before[0], before[2])
        assert (merge.warmups == before[1]).all(), "a variation leaves the original alone"
        assert min(changed.rounds) >= 1
        merge = changed


@SOME
@given(cases(), seeds, objectives)
def test_the_first_merges_are_complete_and_fit(case, chosen, objective) -> None:
    case = capped(case, chosen)
    made = list(merges(case.instance))
    for merge in chosen.sample(made, min(4, len(made))):
        timed_merge(case, merge, objective)


@pytest.mark.parametrize("cap", [1.0, 4.0, math.inf])
def test_there_are_merges_for_every_cap(cap: float) -> None:
    instance = equal(range(3), num_microbatches=4, cap=cap)
    made = list(merges(instance))
    assert made
    assert all((merge.warmups >= 1).all() for merge in made)


def test_a_merge_whose_rounds_are_one_is_1f1b() -> None:
    instance = equal(range(3), num_microbatches=4, cap=3.0)
    order = order_from(*merged(instance, Merge((1,), np.array([3, 2, 1]), 1.0)))
    whole = order_of(get("1f1b")(3, 1, 4))
    assert order == tuple(tuple(letter for letter in queue if letter < 6) for queue in whole)


def test_variations_reach_rounds_leads_and_fillings() -> None:
    dice, made = random.Random(0), [Merge((1, 2), np.array([3, 2, 1]), 1.0)]
    for _ in range(300):
        made.append(varied(made[-1], dice))
    assert min(min(merge.rounds) for merge in made) == 1
    assert len({merge.fill for merge in made}) == 5
    assert len({len(merge.rounds) for merge in made}) > 10
    assert len({tuple(merge.warmups - merge.warmups[0]) for merge in made}) > 50
