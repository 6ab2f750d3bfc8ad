"""The planner: nothing that it could have chosen is faster, what it chooses fits, what can't is told."""

import itertools
import statistics
from dataclasses import replace

import pytest
from chains import language_model

from evenflow.cluster.cluster import Cluster, Host
from evenflow.cluster.presets import device_called
from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError, EvenflowError
from evenflow.ir.costs import Link
from evenflow.memory import peak_bytes
from evenflow.plan.costs.in_flight import InFlight, StageBytes
from evenflow.plan.costs.stages import costs_of, stage_costs
from evenflow.plan.costs.traffic import traffic_of
from evenflow.plan.cuts.problem import DoesNotFitError
from evenflow.plan.parallel import Peers, fully_sharded, tensor_parallel
from evenflow.plan.plan import node_labels, positions_in
from evenflow.plan.planner import NoPlanError, plan
from evenflow.plan.rank_memory import TrainingState, rank_memory
from evenflow.plan.recompute import by_worth, recomputed
from evenflow.plan.request import Levers, Request
from evenflow.plan.search.choices import choices
from evenflow.plan.search.expected import expected
from evenflow.plan.search.fit import at_cuts, fitted
from evenflow.plan.search.price import chain_for, lower_bound, price
from evenflow.plan.search.scheduled import splits
from evenflow.plan.search.selective import fitted_selectively
from evenflow.schedules import catalog

LINK = Link(1e-5, 1e10)


def boxes(*names: str, memory: float | None = None, link: Link = LINK) -> Cluster:
    # NCCL's buffers are larger than the models of these tests.
    devices = tuple(replace(device_called(name), communicator_bytes=0.0) for name in names)
    cluster = Cluster((Host(devices, link),))
    # A device keeps a part of its memory for itself.
    return cluster if memory is None else cluster.with_memory(cluster.devices[0].reserved_bytes + memory)


def request(cluster: Cluster, *, rows: int = 16, sizes=(1, 2, 4), levers=None, **model) -> Request:
    of = language_model(cluster, **model)
    state = TrainingState(optimizer_bytes=8.0, update_bytes=0.0)
    return Request(of, sizes, cluster, rows, 32.0, 0.05, state, dtype="float32", levers=levers or Levers())


def all_prices(asked: Request, allowed=lambda choice: True):
    """Every choice with every saving that is allowed, priced."""
    found = []
    for choice in choices(asked):
        for sharding, recompute in itertools.product(
            ("none", "zero1", "fsdp"), ("none", "selective", "full")
        ):
            one = replace(choice, degrees=replace(choice.degrees, sharding=sharding), recompute=recompute)
            if (sharding == "none" or one.degrees.data > 1) and allowed(one):
                try:
                    found.append(price(asked, one, chain_for(asked, one)))
                except EvenflowError:
                    continue
    return found


@pytest.mark.parametrize(("memory", "head"), [(None, 1.0), (12e6, 4.0), (8.6e6, 1.0), (8.6e6, 4.0)])
def test_nothing_that_could_be_chosen_is_faster(memory, head):
    asked = request(boxes("H100", "H100", memory=memory), head=head, rows=8)
    found = plan(asked, search_seconds=0.0)
    prices = all_prices(asked)
    best = min(each.step_seconds for each in prices)
    assert best <= found.prediction.step_seconds <= best * 1.02
    assert all(each.step_seconds >= found.prediction.bound_seconds for each in prices)


@pytest.mark.parametrize("memory", [9e6, 6.5e6, 5e6])
def test_what_is_chosen_fits_with_its_whole_schedule(memory):
    cluster = boxes("H100", "H100", "H100", "H100", memory=memory)
    asked = request(cluster)
    found = plan(asked, search_seconds=0.0)
    choice = found.degrees
    names = asked.chain_of(found.microbatch_size).names
    again = {name for stage in found.stages for name in stage.recompute}
    nodes = [at for at, label in enumerate(node_labels(names)) if label in again]
    chain = tensor_parallel(asked.chain_of(found.microbatch_size), Peers(choice.tensor, LINK))
    if choice.gathers_nodes:
        chain = fully_sharded(chain, Peers(choice.data, LINK), gradient_bytes=1.0)
    chain = recomputed(chain, nodes)
    schedule = catalog.get(found.schedule)(choice.pipeline, found.stages_per_rank, found.num_microbatches)
    kinds = ["H100"] * len(found.stages)
    stages = stage_costs(chain, positions_in(found, names), kinds, splits=splits(schedule))
    traffic = traffic_of(chain, positions_in(found, names))
    parcels = traffic.parcels(schedule.placement.rank_of)
    held = peak_bytes(schedule, costs_of(stages, traffic, {}))
    flying = InFlight(schedule, receives_ahead=1, sends_ahead=1)
    peaks = flying.peaks(
        [
            StageBytes(
                each.saved_bytes,
                each.kept_bytes,
                each.forward_transient_bytes,
                each.backward_transient_bytes,
                sum(parcels[number].received),
                sum(parcels[number].sent),
                each.trained_bytes * asked.state.gradient_bytes,
            )
            for number, each in enumerate(stages)
        ]
    )
    for rank, peak in enumerate(peaks):
        assert 0 < peak.activations <= held[rank] * (1 + 1e-9)
        own = [stages[stage] for stage in schedule.placement.stages_on(rank)]
        need = rank_memory(own, peak, asked.state, choice)
        assert need == found.ranks[rank].memory
        assert need.allocated <= found.ranks[rank].cap_bytes == memory


def test_less_memory_never_makes_a_step_shorter():
    steps = [
        plan(request(boxes("H100", "H100", memory=memory)), search_seconds=0.0).prediction.step_seconds
        for memory in (2e7, 12e6, 9e6, 8e6)
    ]
    # Sharding the optimizer's states makes the update, a millionth of a step, shorter.
    assert steps == pytest.approx(sorted(steps), rel=1e-4)
    assert steps[-1] > steps[0]


def with_experts(of, *, weight: int):
    """`chain_of` where a block's parameters are experts', `weight` times as large."""

    def chain_of(rows):
        chain = of(rows)
        own = tuple(
            replace(
                each,
                is_expert=True,
                num_elements=weight * each.num_elements,
                num_bytes=weight * each.num_bytes,
            )
            if 0 < each.nodes[0] < chain.num_nodes - 1
            else each
            for each in chain.parameters
        )
        return replace(chain, parameters=own, expert_bytes=chain.cut_bytes)

    return chain_of


def test_experts_go_over_devices_where_one_cannot_hold_them():
    asked = request(boxes(*["H100"] * 4, memory=4e7), levers=Levers(tensor=1, pipeline=1, sharding="none"))
    asked = replace(asked, chain_of=with_experts(asked.chain_of, weight=8))
    assert plan(asked).degrees.expert == 4
    with pytest.raises(NoPlanError):
        plan(replace(asked, levers=replace(asked.levers, expert=1)))


def test_gradients_of_experts_are_summed_by_those_that_have_them():
    slow = Link(1e-5, 1e6)
    levers = Levers(pipeline=1, data=4, tensor=1, sharding="none", microbatch_size=1)
    asked = request(boxes(*["H100"] * 4, link=slow), levers=levers)
    asked = replace(asked, chain_of=with_experts(asked.chain_of, weight=8))
    together, apart = (
        plan(replace(asked, levers=replace(levers, expert=expert))).prediction.reduce_seconds
        for expert in (1, 4)
    )
    parameters = asked.chain_of(1).parameters
    experts = sum(each.num_bytes for each in parameters if each.is_expert)
    assert together - apart == pytest.approx(1.5 * experts / 1e6, rel=1e-4)


def test_links_that_are_too_slow_are_not_used():
    slow = plan(request(boxes("H100", "H100", link=Link(10.0, 1.0))), search_seconds=0.0)
    assert (slow.degrees.pipeline, slow.degrees.data) == (1, 1)
    fast = plan(request(boxes("H100", "H100")), search_seconds=0.0)
    assert fast.degrees.num_devices == 2
    assert fast.prediction.step_seconds < 0.7 * slow.prediction.step_seconds


def test_faster_devices_do_more():
    cluster = parse_cluster("2x RTX 4090 + 2x RTX 3090")
    asked = request(cluster, levers=Levers(pipeline=4, stages_per_rank=1), num_blocks=32)
    found = plan(asked, search_seconds=0.0)
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
        (
            Levers(data=1, sharding="zero1"),
            "sharding = 'zero1' shares over data ranks, and no choice has any: leave it out",
        ),
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


def test_a_batch_without_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"a batch of 0 rows .*: plan for at least one row"):
        request(boxes("H100"), rows=0)


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
    assert 0 < len(found.fit.again) < 8
    fewer = replace(choice, recompute="none")
    with pytest.raises(DoesNotFitError):
        price(asked, fewer, chain)
    full = price(asked, replace(choice, recompute="full"), chain)
    assert lower_bound(asked, choice, chain) < found.step_seconds < full.step_seconds


def test_a_lever_of_selective_recomputation_holds_where_nothing_must_be():
    found = plan(request(boxes("H100", "H100"), levers=Levers(recompute="selective")))
    assert not any(stage.recompute for stage in found.stages)


def fewest_over_all_stages(asked, choice, chain):
    """The fewest nodes, those first that free most bytes a second anywhere, with which some cut fits."""
    worth = by_worth(chain, "H100")
    for number in range(len(worth) + 1):
        nodes = {node for unit in worth[:number] for node in unit.nodes}
        try:
            return nodes, fitted(asked, choice, recomputed(chain, nodes))
        except DoesNotFitError:
            continue
    raise AssertionError("all of them suffice")


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved-1f1b", "zb-v"])
@pytest.mark.parametrize(("memory", "head"), [(1.5e7, 1.0), (1e7, 4.0), (9e6, 1.0), (9e6, 4.0)])
def test_ranks_that_hold_most_recompute_most(name, memory, head):
    per_rank = catalog.default_stages_per_rank(name)
    levers = Levers(pipeline=4, stages_per_rank=per_rank, schedule=name, microbatch_size=2)
    asked = request(boxes(*["H100"] * 4, memory=memory), levers=levers, num_blocks=24, head=head)
    choice = replace(next(iter(choices(asked))), recompute="selective")
    chain = chain_for(asked, choice)
    fit = fitted_selectively(asked, choice, chain)
    nodes = fit.again
    assert max(fit.over_bytes) <= 0
    again = [sum(stage.start <= node < stage.end for node in nodes) for stage in fit.stages]
    own = [sum(again[stage] for stage in fit.schedule.placement.stages_on(rank)) for rank in range(4)]
    if name == "1f1b":
        assert sum(own[:2]) >= sum(own[2:])
    # No rank recomputes a node that it need not.
    for node in nodes:
        fewer = recomputed(chain, [each for each in nodes if each != node])
        assert max(at_cuts(asked, choice, fewer, fit.positions, fit.groups).over_bytes) > 0
    before, other = fewest_over_all_stages(asked, choice, chain)
    assert max(fit.load_seconds) <= max(other.load_seconds) * 1.001, (nodes, before)


@pytest.mark.parametrize("memory", [None, 2e7])
def test_what_is_expected_is_near_to_what_comes_out(memory):
    asked = request(boxes(*["H100"] * 4, memory=memory), num_blocks=60, head=1.0, sizes=(2,))
    ratios = []
    for choice in choices(asked):
        for recompute in ("none", "selective"):
            one = replace(choice, recompute=recompute)
            chain = chain_for(asked, one)
            try:
                found, told = price(asked, one, chain), expected(asked, one, chain)
            except EvenflowError:
                continue
            if recompute == "selective" or told.is_roomy:
                ratios.append(told.seconds / found.step_seconds)
    assert len(ratios) > 20
    # What is expected to be slower than it is might be overlooked.
    assert max(ratios) < 1.1
    assert statistics.median(ratios) > 0.95


def test_progress_is_told():
    told = []
    plan(request(boxes("H100", "H100")), search_seconds=0.0, progress=lambda *each: told.append(each))
    numbers = [number for number, _, _ in told]
    assert numbers == sorted(numbers)
    assert 0 < numbers[-1] <= told[-1][1]
    assert told[-1][2] < float("inf")


def test_each_way_to_a_neighbour_takes_memory():
    cluster = boxes(*["H100"] * 4, memory=1e9)
    devices = tuple(replace(device, communicator_bytes=1e5) for device in cluster.devices)
    asked = request(replace(cluster, hosts=(Host(devices, LINK),)), levers=Levers(pipeline=4))
    best = plan(asked, search_seconds=0.0)
    assert best.stages_per_rank == 1
    assert [rank.memory.communicators for rank in best.ranks] == [2e5, 4e5, 4e5, 2e5]


@pytest.mark.parametrize("memory", [7e6, 6.5e6])
def test_what_waits_for_its_backward_is_counted(memory):
    levers = Levers(pipeline=4, stages_per_rank=1, schedule="1f1b", microbatch_size=4, recompute="none")
    found = plan(request(boxes("H100", "H100", "H100", "H100", memory=memory), levers=levers))
    assert all(rank.memory.allocated <= memory for rank in found.ranks)
