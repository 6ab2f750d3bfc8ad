"""Partitioning: as light as can be, where it is legal, and with few bytes among equals."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.plan.partition import TOLERANCE, bottleneck, partition


@st.composite
def chains(draw: st.DrawFn):
    size = draw(st.integers(1, 9))
    costs = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
    cut_bytes = draw(st.lists(st.integers(0, 9), min_size=size + 1, max_size=size + 1))
    legal = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=size + 1, max_size=size + 1))
    return costs, cut_bytes, legal, draw(st.integers(1, 5))


def every_cut(legal, size: int, num_stages: int):
    places = [at for at in range(1, size) if legal[at]]
    return list(itertools.combinations(places, num_stages - 1))


@given(chains())
def test_no_cut_is_better(chain):
    costs, cut_bytes, legal, num_stages = chain
    candidates = every_cut(legal, len(costs), num_stages)
    if not candidates:
        with pytest.raises(ConfigError):
            partition(costs, cut_bytes=cut_bytes, legal=legal, num_stages=num_stages)
        return
    found = partition(costs, cut_bytes=cut_bytes, legal=legal, num_stages=num_stages)
    assert found in candidates
    best = min(bottleneck(costs, cut) for cut in candidates)
    assert bottleneck(costs, found) <= best * (1 + TOLERANCE) + 1e-9


@given(chains())
def test_among_cuts_that_are_as_good_none_sends_fewer_bytes(chain):
    costs, cut_bytes, legal, num_stages = chain
    candidates = every_cut(legal, len(costs), num_stages)
    if not candidates:
        return
    found = partition(costs, cut_bytes=cut_bytes, legal=legal, num_stages=num_stages)
    best = min(bottleneck(costs, cut) for cut in candidates)
    as_good = [cut for cut in candidates if bottleneck(costs, cut) <= best * (1 + TOLERANCE)]

    def sent(cut) -> int:
        return sum(cut_bytes[at] for at in cut)

    assert sent(found) <= min(sent(cut) for cut in as_good)


@given(chains(), st.sampled_from([1e-9, 1e9, 1 / 3]))
def test_the_unit_of_costs_does_not_matter(chain, unit):
    costs, cut_bytes, legal, num_stages = chain
    if not every_cut(legal, len(costs), num_stages):
        return
    scaled = [cost * unit for cost in costs]
    found = partition(costs, cut_bytes=cut_bytes, legal=legal, num_stages=num_stages)
    again = partition(scaled, cut_bytes=cut_bytes, legal=legal, num_stages=num_stages)
    assert bottleneck(costs, again) == pytest.approx(bottleneck(costs, found), rel=TOLERANCE)


def test_one_stage_needs_no_cut():
    assert partition([1.0, 2.0], cut_bytes=[0, 0, 0], legal=[False] * 3, num_stages=1) == ()


def test_as_many_stages_as_nodes():
    assert partition([5.0, 0.0, 1.0], cut_bytes=[0] * 4, legal=[True] * 4, num_stages=3) == (1, 2)


def test_too_few_places_says_how_many_there_are():
    with pytest.raises(
        ConfigError,
        match=r"^4 stages need 3 cuts, but the recorded program has 5 nodes and 2 places to cut; "
        r"ask for at most 3 stages$",
    ):
        partition([1.0] * 5, cut_bytes=[0] * 6, legal=[True, True, False, True, False, True], num_stages=4)


def test_a_long_chain_is_cut_quickly():
    costs = [float(1 + i * 7 % 13) for i in range(20_000)]
    found = partition(costs, cut_bytes=[1.0] * 20_001, legal=[True] * 20_001, num_stages=64)
    assert len(found) == 63
    assert bottleneck(costs, found) <= sum(costs) / 64 * (1 + TOLERANCE) + max(costs)
