"""Moved cuts: never slower, within memory and the legal places, and near the best of all cuts."""

import functools
import itertools
import random
import statistics
from dataclasses import replace

import pytest
from test_planner import boxes, request

from evenflow.plan.chain import Seconds
from evenflow.plan.layers import cut_only_at
from evenflow.plan.planner import plan
from evenflow.plan.recompute import recomputed
from evenflow.plan.request import Levers, Request
from evenflow.plan.search import refine
from evenflow.plan.search.choices import choices
from evenflow.plan.search.fit import at_cuts
from evenflow.plan.search.price import Priced, chain_for, price, priced_fit
from evenflow.plan.search.refine import refined

KINDS = (("1f1b", 1, 3), ("zb-h1", 1, 4), ("interleaved-1f1b", 2, 2), ("zb-v", 2, 2))  # stages a rank, ranks
SEEDS = range(3)
CASES = [(kind, room, seed) for kind in KINDS for room in (None, 1.001) for seed in SEEDS]


def uneven(kind, room, seed) -> Request:
    """Nodes of different lengths, and one schedule; `room`: a device's memory, in the largest rank's need."""
    schedule, per_rank, num_ranks = kind
    drawn = random.Random(seed)
    names = [drawn.choice(["H100", "A100"]) for _ in range(num_ranks)] if seed % 2 else ["H100"] * num_ranks
    levers = Levers(pipeline=num_ranks, stages_per_rank=per_rank, schedule=schedule, recompute="none")
    asked = request(boxes(*names), rows=4, sizes=(1,), num_blocks=8, levers=levers)
    of, times = asked.chain_of, [0.2 + 2 * drawn.random() for _ in range(10)]

    @functools.cache
    def chain_of(rows):
        chain = of(rows)
        seconds = {
            name: Seconds(
                *(
                    tuple(a * b for a, b in zip(part, times, strict=True))
                    for part in (each.forward, each.input_grad, each.weight_grad)
                )
            )
            for name, each in chain.seconds.items()
        }
        return replace(chain, seconds=seconds)

    asked = replace(asked, chain_of=chain_of)
    if room is None:
        return asked
    most = max(need.allocated for need in priced_as_cut(asked).fit.memory)
    return replace(asked, cluster=boxes(*names, memory=room * most))


def priced_as_cut(asked: Request, recompute: str = "none") -> Priced:
    choice = replace(next(choices(asked)), recompute=recompute)
    return price(asked, choice, chain_for(asked, choice))


def best_of_all(asked: Request, start: Priced) -> float:
    """The shortest step of every cut that fits."""
    chain = recomputed(chain_for(asked, start.choice), start.fit.again)
    places = [place for place in range(1, chain.num_nodes) if chain.legal[place]]
    fits = (
        at_cuts(asked, start.choice, chain, cuts, start.fit.groups)
        for cuts in itertools.combinations(places, len(start.fit.positions))
    )
    return min(priced_fit(asked, start.choice, fit).step_seconds for fit in fits if max(fit.over_bytes) <= 0)


def above_the_best(kind, room, seed) -> tuple[float, float]:
    """By how much the step is longer than the best of all, as a share: as it was cut, and refined."""
    asked = uneven(kind, room, seed)
    start = priced_as_cut(asked)
    best, found = best_of_all(asked, start), refined(asked, start)
    assert max(found.fit.over_bytes) <= 0
    return start.step_seconds / best - 1, found.step_seconds / best - 1


def test_it_fits_is_never_slower_and_mostly_the_best_of_all_cuts():
    before, after = zip(*itertools.starmap(above_the_best, CASES), strict=True)
    assert all(-1e-9 <= now <= min(then, 0.02) for then, now in zip(before, after, strict=True))
    assert statistics.mean(before) > 0.03
    assert statistics.mean(after) < 0.003


def test_memory_has_a_say():
    roomy, scarce = (uneven(KINDS[0], room, 1) for room in (None, 1.001))
    assert priced_as_cut(roomy).fit.positions == priced_as_cut(scarce).fit.positions
    fast, fits = (refined(asked, priced_as_cut(asked)).step_seconds for asked in (roomy, scarce))
    assert fast < fits * 0.99


def test_cuts_stay_where_they_may_stand():
    asked = uneven(KINDS[2], None, 2)
    chain_of, places = asked.chain_of, {1, 2, 3, 6, 7, 9}
    limited = replace(asked, chain_of=lambda rows: cut_only_at(chain_of(rows), places))
    start = priced_as_cut(limited)
    found = refined(limited, start)
    assert set(found.fit.positions) <= places
    assert found.step_seconds < start.step_seconds
    assert found.step_seconds == pytest.approx(best_of_all(limited, start), rel=0.02)

    fixed = replace(asked, chain_of=lambda rows: cut_only_at(chain_of(rows), {1, 2, 6}))
    assert refined(fixed, priced_as_cut(fixed)).fit.positions == (1, 2, 6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_recomputed_stays_so(recompute):
    levers = Levers(pipeline=2, tensor=1, stages_per_rank=2, schedule="interleaved-1f1b")
    asked = request(boxes("H100", "H100", memory=9e6), rows=4, sizes=(1,), levers=levers)
    start = priced_as_cut(asked, recompute)
    found = refined(asked, start)
    assert found.fit.again == start.fit.again != ()
    assert found.step_seconds < start.step_seconds
    assert found.step_seconds == pytest.approx(best_of_all(asked, start), rel=0.02)


def test_a_few_stages_may_move_together():
    # The head's rank does least with one node in stage 1, but then each microbatch waits for stage 2.
    levers = Levers(pipeline=2, tensor=2, stages_per_rank=2, schedule="interleaved-1f1b", microbatch_size=4)
    asked = request(boxes(*["H100"] * 4), num_blocks=13, levers=levers)
    start = priced_as_cut(asked)
    assert start.fit.positions == (1, 2, 10)
    assert refined(asked, start).step_seconds <= best_of_all(asked, start) * 1.001 < start.step_seconds


@pytest.mark.parametrize(("kind", "seed"), [(KINDS[2], 5), (KINDS[3], 27)])
def test_even_stages_are_a_better_start_at_times(kind, seed):
    before, after = above_the_best(kind, None, seed)
    assert before > 0.09
    assert after < 1e-9


def test_at_times_a_short_way_does_not_help_and_a_longer_one_does():
    before, after = above_the_best(KINDS[3], None, 29)
    assert before > 0.06
    assert after < 1e-9


def test_a_plan_has_refined_cuts_and_an_honest_bound():
    asked = uneven(KINDS[2], None, 2)
    found = plan(asked).prediction
    assert found.step_seconds < priced_as_cut(asked).step_seconds * 0.9
    assert found.bound_seconds <= best_of_all(asked, priced_as_cut(asked)) <= found.step_seconds


def test_of_schedules_with_many_ops_no_cut_is_tried(monkeypatch):
    asked = uneven(KINDS[2], None, 2)
    start = priced_as_cut(asked)
    monkeypatch.setattr(refine, "_MOST_OPS", sum(map(len, start.fit.schedule.ranks)) - 1)
    assert refined(asked, start) == start
