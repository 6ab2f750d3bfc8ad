"""A move can be taken back exactly, keeps every op, and an annealing never loses what it began with."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import STRICT, capped, cases, check, cost_of, equal, order_from, random_order, strings

from evenflow.search.anneal import NOTHING, anneal, beyond, hint, place_of, shift, shift_many, take_back
from evenflow.search.chance import Cooling, chance
from evenflow.search.engine import Candidate, Engine
from evenflow.search.tables import tables_of
from evenflow.search.timing import Reading, trace_for

SOME = settings(derandomize=True, deadline=None, max_examples=30)
objectives = st.sampled_from(["span", "makespan"])
seeds = st.integers(0, 2**32).map(random.Random)
queues = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def row(letters: list[int]) -> np.ndarray:
    return np.array(letters, np.int16)


@SOME
@given(queues, st.data())
def test_a_shift_moves_one_letter(letters, data) -> None:
    places = st.integers(0, len(letters) - 1)
    source, target = data.draw(places), data.draw(places)
    found, expected = row(letters), list(letters)
    expected.insert(target, expected.pop(source))
    shift(found, source, target)
    assert found.tolist() == expected


@SOME
@given(queues, st.data(), st.integers(-6, 6).filter(bool))
def test_beyond_counts_letters_of_other_kinds(letters, data, distance) -> None:
    source = data.draw(st.integers(0, len(letters) - 1))
    target = beyond(row(letters), len(letters), source, distance)
    passed = letters[source + 1 : target + 1] if distance > 0 else letters[target:source]
    others = [letter for letter in passed if letter != letters[source]]
    at_the_end = target == (len(letters) - 1 if distance > 0 else 0)
    assert len(others) == abs(distance) or (at_the_end and len(others) < abs(distance))
    assert target == source or letters[target] != letters[source] or at_the_end


@SOME
@given(queues, st.integers(0, 5), st.integers(0, 4))
def test_a_letters_place_is_found_by_its_microbatch(letters, letter, microbatch) -> None:
    places = [at for at, each in enumerate(letters) if each == letter]
    expected = places[microbatch] if microbatch < len(places) else NOTHING
    assert place_of(row(letters), len(letters), letter, microbatch) == expected


@SOME
@given(cases(), seeds, st.booleans())
def test_moves_keep_every_op_and_are_taken_back_exactly(case, chosen, lazy) -> None:
    num = case.placement.num_stages
    tables = tables_of(case.instance, "span")
    journal, state = trace_for(tables).journal, chance(chosen.randrange(2**32))
    order, lengths = strings(random_order(case, chosen))
    made = 0
    for _ in range(30):
        before = order_from(order, lengths)
        rank = chosen.randrange(len(lengths))
        at = chosen.randrange(lengths[rank])
        move = hint if lazy and chosen.random() < 0.5 else shift_many
        count = move(tables, order, lengths, journal, state, rank, at)
        after = order_from(order, lengths)
        assert count or after == before
        made += after != before
        kept = 2 if move is hint else 3
        for queue, moved in zip(before, after, strict=True):
            assert sorted(filter((kept * num).__gt__, queue)) == sorted(filter((kept * num).__gt__, moved))
            assert abs(len(moved) - len(queue)) <= (move is hint)
        if chosen.random() < 0.7:
            take_back(order, lengths, journal, count)
            assert order_from(order, lengths) == before
    assert made > 0 or num * case.num_microbatches <= 2


@SOME
@given(cases(), seeds, objectives, st.booleans(), st.sampled_from([0.0, 0.3]))
def test_an_annealing_is_never_worse_than_its_start(case, chosen, objective, lazy, spread) -> None:
    order = random_order(case, chosen)
    case = capped(case, chosen)
    instance = case.instance
    tables = tables_of(instance, objective)
    trace = trace_for(tables)
    first, _ = cost_of(instance, order, objective, Reading(lazy, 1.0, 0.0))
    work, (best_order, best_lengths) = strings(order), strings(order)
    cooling, state = Cooling(3000.0, 1.0, 0.1), chance(chosen.randrange(2**32))
    best = anneal(
        tables, trace, *work, Reading(lazy, 1.0, spread), state, cooling, best_order, best_lengths, -1e9
    )
    if best < 1e299:
        check(case, order_from(best_order, best_lengths), best, objective)
    assert best <= first
    size = 3 * case.placement.num_stages * (case.num_microbatches + 1)
    assert 3000 <= trace.num_ops[0] <= 3000 + 2 * size


def annealed(engine: Engine, order, ops: float = 1e5, *, lazy: bool = False) -> Candidate:
    return engine.annealed(engine.timed(*strings(order), lazy=False), ops, lazy=lazy)


ONE_BY_ONE = tuple((stage, 3 + stage, 6 + stage) * 6 for stage in range(3))


@pytest.mark.parametrize("lazy", [False, True])
def test_annealing_makes_a_poor_order_good(lazy: bool) -> None:
    instance = equal(range(3), num_microbatches=6, cap=3.0)
    engine = Engine(instance, "makespan", seed=0)
    start = engine.timed(*strings(ONE_BY_ONE), lazy=False)
    assert start.excess == 6 * 7 - 6 * 3  # a microbatch takes 7 seconds to come back to rank 0
    found = annealed(engine, ONE_BY_ONE, 3e5, lazy=lazy)
    assert found.excess < 4.0
    assert engine.leaders[0] is found
    order = order_from(found.order, found.lengths)
    assert cost_of(instance, order, "makespan", STRICT) == (found.excess, order)


def test_it_stops_at_its_goal() -> None:
    instance = equal(range(3), num_microbatches=6, cap=3.0)
    spent = []
    for goal in (30.0, 10.0, 0.0):
        engine = Engine(instance, "makespan", seed=0, target=6 * 3 + goal)
        found = annealed(engine, ONE_BY_ONE)
        spent.append(engine.spent)
        assert engine.done == (found.excess <= goal + 1e-9)
    assert spent[0] < 1e3 < spent[1] < 5e4
    assert spent[2] == pytest.approx(1e5, rel=0.02)


def test_the_seed_decides() -> None:
    instance = equal(range(3), num_microbatches=6, cap=3.0, latency=0.3)

    def found(seed: int):
        candidate = annealed(Engine(instance, "makespan", seed=seed), ONE_BY_ONE, 2e4)
        return order_from(candidate.order, candidate.lengths)

    assert found(1) == found(1)
    assert len({found(seed) for seed in range(4)}) > 1
