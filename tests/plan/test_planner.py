"""The planner: nothing that it could have chosen is faster, what it chooses fits, what can't is told."""

from dataclasses import replace

import pytest
from chains import language_model

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.presets import device_called
from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError, EvenflowError
from evenflow.ir.costs import Link
from evenflow.memory import peak_bytes
from evenflow.plan.parallel import tensor_parallel
from evenflow.plan.plan import node_labels, positions_in
from evenflow.plan.planner import _SAVINGS, NoPlanError, choices, plan
from evenflow.plan.price import chain_for, lower_bound, price
from evenflow.plan.problem import DoesNotFitError
from evenflow.plan.rank_memory import TrainingState, rank_memory
from evenflow.plan.recompute import recomputed
from evenflow.plan.request import Levers, Request
from evenflow.plan.stages import costs_of, stage_costs
from evenflow.schedules import catalog

LINK = Link(1e-5, 1e10)


def boxes(*names: str, memory: float | None = None, link: Link = LINK) -> Cluster:
    cluster = Cluster((Host(tuple(map(device_called, names)), link),))
    # A device keeps a part of its memory for itself.
    return cluster if memory is None else cluster.with_memory(cluster.devices[0].reserved_bytes + memory)


def request(cluster: Cluster, *, rows: int = 16, sizes=(1, 2, 4), levers=None, **model) -> Request:
    of = language_model(cluster, **model)
    state = TrainingState(optimizer_bytes=8.0, update_bytes=0.0)
    return Request(of, sizes, cluster, rows, 32.0, 0.05, state, dtype="float32", levers=levers or Levers())


def all_prices(asked: Request):
    """Every choice with every saving, priced."""
    found = []
    for choice in choices(asked):
        for sharding, recompute in _SAVINGS:
            one = replace(choice, degrees=replace(choice.degrees, sharding=sharding), recompute=recompute)
            if sharding == "none" or one.degrees.data > 1:
                try:
                    found.append(price(asked, one, chain_for(asked, one)))
                except EvenflowError:
                    continue
    return found


@pytest.mark.parametrize("memory", [None, 12e6, 8.6e6])
@pytest.mark.parametrize("head", [1.0, 4.0])
def test_nothing_that_could_be_chosen_is_faster(memory, head):
    asked = request(boxes("H100", "H100", memory=memory), head=head, rows=8)
    found = plan(asked)
    prices = all_prices(asked)
    best = min(each.step_seconds for each in prices)
    assert best <= found.prediction.step_seconds <= best * 1.02
    assert all(each.step_seconds >= found.prediction.bound_seconds for each in prices)


@pytest.mark.parametrize("memory", [9e6, 6.5e6, 5e6])
def test_what_is_chosen_fits_with_its_whole_schedule(memory):
    cluster = boxes("H100", "H100", "H100", "H100", memory=memory)
    asked = request(cluster)
    found = plan(asked)
    choice = found.degrees
    names = asked.chain_of(found.microbatch_size).names
    again = {name for stage in found.stages for name in stage.recompute}
    nodes = [at for at, label in enumerate(node_labels(names)) if label in again]
    chain = recomputed(tensor_parallel(asked.chain_of(found.microbatch_size), choice.tensor, LINK), nodes)
    schedule = catalog.get(found.schedule)(choice.pipeline, found.stages_per_rank, found.num_microbatches)
    stages = stage_costs(chain, positions_in(found, names), ["H100"] * len(found.stages))
    peaks = peak_bytes(schedule, costs_of(stages, {}))
    for rank, peak in enumerate(peaks):
        own = [stages[stage] for stage in schedule.placement.stages_on(rank)]
        need = rank_memory(own, peak, asked.state, data_ranks=choice.data, sharding=choice.sharding)
        assert need == found.ranks[rank].memory
        assert need.allocated <= found.ranks[rank].cap_bytes == memory


def test_less_memory_never_makes_a_step_shorter():
    steps = [
        plan(request(boxes("H100", "H100", memory=memory))).prediction.step_seconds
        for memory in (2e7, 12e6, 9e6, 8e6)
    ]
    # Sharding the optimizer's states makes the update, a millionth of a step, shorter.
    assert steps == pytest.approx(sorted(steps), rel=1e-4)
    assert steps[-1] > steps[0]


def test_links_that_are_too_slow_are_not_used():
    slow = plan(request(boxes("H100", "H100", link=Link(10.0, 1.0))))
    assert (slow.degrees.pipeline, slow.degrees.data) == (1, 1)
    fast = plan(request(boxes("H100", "H100")))
    assert fast.degrees.num_devices == 2
    assert fast.prediction.step_seconds < 0.7 * slow.prediction.step_seconds


def test_faster_devices_do_more():
    cluster = parse_cluster("2x RTX 4090 + 2x RTX 3090")
    found = plan(request(cluster, levers=Levers(pipeline=4, stages_per_rank=1), num_blocks=32))
    nodes = dict.fromkeys(("RTX 4090", "RTX 3090"), 0)
    for stage in found.stages:
        nodes[found.ranks[stage.rank].device] += stage.num_nodes
    assert sorted(rank.device for rank in found.ranks) == ["RTX 3090"] * 2 + ["RTX 4090"] * 2
    assert nodes["RTX 4090"] > nodes["RTX 3090"]


def test_levers_are_kept():
    levers = Levers(pipeline=2, data=1, stages_per_rank=2, schedule="zb-v", microbatch_size=2)
    found = plan(request(boxes("H100", "H100"), levers=levers))
    assert (found.schedule, found.stages_per_rank, found.microbatch_size) == ("zb-v", 2, 2)
    assert (found.num_microbatches, len(found.stages)) == (8, 4)
    assert [stage.rank for stage in found.stages] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("levers", "message"),
    [
        (Levers(pipeline=3), "3 pipeline ranks are asked for, and 2 devices"),
        (Levers(pipeline=2, data=2), "2 pipeline x 2 data ranks are asked for, and 2 devices"),
        (Levers(microbatch_size=3), "microbatches of 3 rows, from the 15 rows.*can be planned are 1, 2, 4"),
        (Levers(microbatch_size=2), "microbatches of 2 rows, from the 15 rows"),
        (Levers(data=2), "15 rows cannot be parted evenly over 2 data ranks: give a multiple of 2"),
        (
            Levers(num_microbatches=4),
            "4 microbatches, from the 15 rows of a data rank: make it a divisor of 15",
        ),
        (Levers(num_microbatches=3), "3 microbatches, from the 15 rows of a data rank, have 5 each"),
        (Levers(pipeline=2, schedule="gpipe"), "the schedule gpipe with any number of stages a rank"),
    ],
)
def test_levers_that_leave_nothing_are_refused(levers, message):
    with pytest.raises(ConfigError, match=message):
        plan(request(boxes("H100", "H100"), rows=15, levers=levers))


def test_more_stages_than_places_to_cut_are_refused():
    with pytest.raises(
        ConfigError, match=r"16 stages need 15 cuts, .* 10 nodes .*; ask for at most 10 stages"
    ):
        plan(request(boxes(*["H100"] * 16), levers=Levers(pipeline=16, stages_per_rank=1)))


def test_what_cannot_fit_is_told_in_numbers():
    with pytest.raises(
        NoPlanError, match=r"no plan fits into memory; the nearest: 2 pipeline ranks"
    ) as raised:
        plan(request(boxes("H100", "H100", memory=1e6)))
    assert raised.value.cap_bytes == 1e6
    assert raised.value.needed_bytes > 1e6
    assert isinstance(raised.value, ConfigError)


def test_a_selective_plan_recomputes_as_little_as_fits():
    levers = Levers(pipeline=2, stages_per_rank=1, schedule="1f1b", microbatch_size=4, recompute="selective")
    asked = request(boxes("H100", "H100", memory=8.5e6), levers=levers)
    choice = replace(next(iter(choices(asked))), recompute="selective")
    chain = chain_for(asked, choice)
    found = price(asked, choice, chain)
    assert 0 < len(found.recompute) < 8
    fewer = replace(choice, recompute="none")
    with pytest.raises(DoesNotFitError):
        price(asked, fewer, chain)
    full = price(asked, replace(choice, recompute="full"), chain)
    assert lower_bound(asked, choice, chain) < found.step_seconds < full.step_seconds


def test_progress_is_told():
    told = []
    plan(request(boxes("H100", "H100")), progress=lambda *each: told.append(each))
    assert [number for number, _, _ in told] == list(range(len(told)))
    assert told[-1][2] < float("inf")


@pytest.mark.parametrize("memory", [7e6, 6.5e6])
def test_what_waits_for_its_backward_is_counted(memory):
    levers = Levers(pipeline=4, stages_per_rank=1, schedule="1f1b", microbatch_size=4, recompute="none")
    found = plan(request(boxes("H100", "H100", "H100", "H100", memory=memory), levers=levers))
    assert all(rank.memory.allocated <= memory for rank in found.ranks)
