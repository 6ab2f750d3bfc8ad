"""Whatever the sizes, every schedule of the catalog is in order, proven, read again and fits its memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brute_force import is_complete, peaks, times
from evenflow.ir import Costs, Flow, Forward, InputGrad, Schedule, WeightGrad
from evenflow.lower import lower
from evenflow.memory import peak_bytes
from evenflow.rules import results
from evenflow.schedule_file import format_schedule, parse_schedule
from evenflow.schedules.catalog import SCHEDULES, get
from evenflow.simulate import simulate
from evenflow.validate import prove

STAGES_PER_RANK = {
    **dict.fromkeys(["1f1b", "eager-1f1b", "zb-h1", "zb-h2", "zb-auto"], st.just(1)),
    **dict.fromkeys(["zb-v", "v-half", "v-min", "dualpipe-v"], st.just(2)),
}
any_number = st.integers(1, 3)
every_method = pytest.mark.parametrize("name", SCHEDULES)
SOME = settings(derandomize=True, deadline=None, max_examples=15)


def sizes(name: str, most_ranks: int, most_microbatches: int) -> st.SearchStrategy[tuple[int, int, int]]:
    on_each = STAGES_PER_RANK.get(name, any_number)
    return st.tuples(st.integers(1, most_ranks), on_each, st.integers(1, most_microbatches))


def stated_peak(name: str, rank: int, p: int, v: int, m: int) -> int:
    """The most activations of a stage that a rank may hold, as the method's docstring says."""
    group = -(-m // max(1, m // p))  # the largest of m // p even groups
    stated = {
        "sequential": v,
        "gpipe": v * m,
        "looped-bfs": v * m,
        "1f1b": p - rank,
        "eager-1f1b": 2 * (p - 1 - rank) + 1,
        "interleaved-1f1b": p - rank if v == 1 else 2 * (p - 1) + (v - 1) * group + 1,
        "zb-h1": p,
        "zb-h2": 2 * p - 1,
        "zb-auto": p,
        "interleaved-zb": (v - 1) * group + p,
        "zb-v": 2 * p,
        "v-half": p + 2,
        "v-min": min(p + 2, 2 * (p // 3) + 4),
        "dualpipe-v": 2 * p + 1,
    }[name]
    return min(stated, v * m)


def check(schedule: Schedule, name: str, num_ranks: int, on_each: int, num_microbatches: int) -> None:
    """All but the memory."""
    assert (schedule.name, schedule.num_microbatches) == (name, num_microbatches)
    placement, num_stages = schedule.placement, num_ranks * on_each
    assert (placement.num_ranks, placement.num_stages) == (num_ranks, num_stages)
    assert schedule.trains is (name != "forward-only")
    for stage, rank in enumerate(placement.rank_of):
        made = [result for op in schedule.ranks[rank] for result in results(op) if result.stage == stage]
        for kind in (Forward, InputGrad, WeightGrad) if schedule.trains else (Forward,):
            order = [result.microbatch for result in made if isinstance(result, kind)]
            assert order == list(range(num_microbatches))
    flow = Flow.chain(num_stages)
    assert prove(lower(schedule, flow)).program.schedule is schedule
    assert simulate(schedule, flow, Costs.uniform(num_stages)).makespan_seconds > 0
    assert parse_schedule(format_schedule(schedule), name="") == schedule


@every_method
def test_any_size_is_in_order_is_proven_runs_and_is_read_again(name: str) -> None:
    @SOME
    @given(sizes(name, 9, 20))
    def holds(counts: tuple[int, int, int]) -> None:
        check(get(name)(*counts), name, *counts)

    holds()


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "forward-only"])
def test_no_rank_holds_more_than_is_stated(name: str) -> None:
    @SOME
    @given(sizes(name, 14, 40))
    def holds(counts: tuple[int, int, int]) -> None:
        schedule = get(name)(*counts)
        for rank, peak in enumerate(peak_bytes(schedule, Costs.uniform(schedule.placement.num_stages))):
            assert peak <= stated_peak(name, rank, *counts)

    holds()


@every_method
def test_small_sizes_agree_with_brute_force(name: str) -> None:
    @SOME
    @given(sizes(name, 4, 7), st.sampled_from([(1, 1, 1, 0), (2, 3, 1, 1), (3, 5, 4, 2)]))
    def holds(counts: tuple[int, int, int], seconds: tuple[int, int, int, int]) -> None:
        schedule = get(name)(*counts)
        num_stages = schedule.placement.num_stages
        flow, costs = (
            Flow.chain(num_stages),
            Costs.uniform(num_stages, *seconds[:3], latency_seconds=seconds[3]),
        )
        assert is_complete(schedule)
        exact = times(schedule, flow, costs)
        timeline = simulate(schedule, flow, costs)
        assert exact == [[*zip(lane.start_seconds, lane.end_seconds, strict=True)] for lane in timeline.lanes]
        assert tuple(peaks(schedule, costs)) == peak_bytes(schedule, costs)

    holds()
