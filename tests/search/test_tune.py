"""A changed taste is still one, and tuning returns the best list on the way, as the exact checker has it."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import capped, cases, check, equal, order_from

from evenflow.search.chance import chance
from evenflow.search.engine import Engine
from evenflow.search.listing import Taste
from evenflow.search.tables import tables_of
from evenflow.search.timing import INFEASIBLE
from evenflow.search.tune import change, keep

SOME = settings(derandomize=True, deadline=None, max_examples=10)
seeds = st.integers(0, 2**32).map(random.Random)


def plain(num_stages: int, cap: int) -> Taste:
    return Taste(np.full(num_stages, cap), np.zeros(2 * num_stages), np.array([0.0, 1.0]), 0.0)


def test_a_changed_taste_stays_within_what_a_taste_is() -> None:
    tables = tables_of(equal((0, 1, 1, 0), num_microbatches=5, cap=5.0), "span")
    taste, before, state = plain(4, 2), plain(4, 2), chance(0)
    changed = set()
    for _ in range(2000):
        keep(taste, before)
        change(tables, taste, state, 1.0)
        assert min(taste.caps) >= 1
        assert taste.mood[0] >= 0
        assert 0 <= taste.mood[1] <= 1
        changed |= {
            name
            for name, one, other in zip(("caps", "offsets", "mood"), taste, before, strict=False)
            if (one != other).any()
        }
    assert changed == {"caps", "offsets", "mood"}


@SOME
@given(cases(), seeds, st.sampled_from(["span", "makespan"]))
def test_what_tuning_returns_is_complete_and_fits(case, chosen, objective) -> None:
    case = capped(case, chosen)
    engine = Engine(case.instance, objective, seed=chosen.randrange(2**32))
    found = engine.tuned(plain(case.placement.num_stages, 1), 3e3)
    if found.excess < INFEASIBLE:
        check(case, order_from(found.order, found.lengths), found.excess, objective)


def test_tuning_makes_a_poor_taste_good() -> None:
    engine = Engine(equal(range(3), num_microbatches=6, cap=3.0), "makespan", seed=0)
    first = engine.tuned(plain(3, 1), 1.0)
    found = engine.tuned(plain(3, 1), 2e5)
    assert first.excess > 10.0, "a microbatch at a time"
    assert found.excess < 4.0
    assert engine.leaders[0] is found
