"""Random numbers of compiled code are spread as they say, and their seed says it all."""

import statistics

import pytest

from evenflow.search.chance import Cooling, below, chance, geometric, heat_at, normal, uniform


def drawn(function, *arguments, seed: int = 0, count: int = 4000) -> list[float]:
    state = chance(seed)
    return [function(state, *arguments) for _ in range(count)]


def test_a_seed_says_it_all() -> None:
    assert drawn(uniform, count=5) == drawn(uniform, count=5)
    firsts = [drawn(uniform, seed=seed, count=1)[0] for seed in range(1000)]
    assert len(set(firsts)) == 1000
    assert statistics.mean(firsts) == pytest.approx(0.5, abs=0.03)


def test_numbers_are_spread_as_they_say() -> None:
    each = drawn(uniform)
    assert 0 <= min(each) < 0.01
    assert 0.99 < max(each) < 1
    assert statistics.mean(each) == pytest.approx(0.5, abs=0.02)
    wholes = drawn(below, 5)
    assert all(abs(wholes.count(number) - 800) < 100 for number in range(5))
    for mean in (1.0, 8.0):
        steps = drawn(geometric, mean)
        assert min(steps) == 0
        assert statistics.mean(steps) == pytest.approx(mean, rel=0.1)
    bells = drawn(normal)
    assert statistics.mean(bells) == pytest.approx(0.0, abs=0.05)
    assert statistics.stdev(bells) == pytest.approx(1.0, abs=0.05)


def test_heat_falls_by_the_same_share_for_each_op() -> None:
    cooling = Cooling(num_ops=100.0, hot=8.0, cold=2.0)
    assert [heat_at(cooling, at) for at in (0.0, 50.0, 100.0)] == pytest.approx([8.0, 4.0, 2.0])
