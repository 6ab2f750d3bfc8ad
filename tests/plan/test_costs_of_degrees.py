"""What other parallelism, recomputation and sharding do to a chain, against numbers worked out by hand."""

import random
from dataclasses import replace

import pytest
from chains import WIDTH, language_model

from evenflow.cluster.short import parse_cluster
from evenflow.errors import ConfigError
from evenflow.ir.costs import Costs, Link
from evenflow.memory import peak_bytes
from evenflow.plan.chain import Handed, Held
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.costs.in_flight import InFlight, StageBytes
from evenflow.plan.costs.stages import stage_costs
from evenflow.plan.parallel import Peers, context_parallel, expert_parallel, fully_sharded, tensor_parallel
from evenflow.plan.rank_memory import Peak, TrainingState, rank_memory
from evenflow.plan.recompute import backward_transients, by_worth, recomputed
from evenflow.plan.scale import scaled
from evenflow.plan.search.scheduled import _REPEATS, _sizes
from evenflow.schedules import catalog

KIND = "H100"


@pytest.fixture
def chain():
    return language_model(parse_cluster(KIND), num_blocks=4)(2)


def held(chain):
    return sum(each.num_bytes for each in chain.saved)


def test_tensor_parallel_shares_all_and_sums_activations(chain):
    link = Link(0.0, 1e6)
    parted = tensor_parallel(chain, Peers(4, link))
    assert held(parted) == held(chain) / 4
    assert [p.num_bytes for p in parted.parameters] == [p.num_bytes // 4 for p in chain.parameters]
    # One matrix in each block: its result is summed once, 2 * 3 / 4 of it over the ring.
    communication = 1.5 * chain.cut_bytes[2] / 1e6
    before, after = chain.seconds[KIND], parted.seconds[KIND]
    assert after.forward[1] == pytest.approx(before.forward[1] / 4 + communication)
    assert after.input_grad[1] == pytest.approx(before.input_grad[1] / 4 + communication)
    assert after.weight_grad[1] == pytest.approx(before.weight_grad[1] / 4)
    assert parted.cut_bytes == chain.cut_bytes


def test_context_parallel_keeps_parameters(chain):
    parted = context_parallel(chain, Peers(2))
    assert parted.parameters == chain.parameters
    assert held(parted) == held(chain) / 2
    assert parted.cut_bytes == tuple(size / 2 for size in chain.cut_bytes)


def with_experts(chain, *, handed=0.0):
    """The chain where all of block 1's parameters are experts', and adding up their gradients takes 0.5 s."""
    own = tuple(replace(parameter, is_expert=parameter.nodes == (1,)) for parameter in chain.parameters)
    times = chain.seconds[KIND]
    slower = tuple(time + 0.5 * (node == 1) for node, time in enumerate(times.weight_grad))
    seconds = {KIND: replace(times, weight_grad=slower)}
    bytes_ = tuple(handed * (node == 1) for node in range(chain.num_nodes))
    return replace(chain, parameters=own, seconds=seconds, expert_bytes=bytes_)


def test_expert_parallel_parts_experts_alone(chain):
    of = language_model(parse_cluster(KIND), num_blocks=4)
    plain, many = with_experts(of(2), handed=1e6), with_experts(of(16), handed=8e6)
    parted = expert_parallel(plain, many, Peers(8, Link(0.0, 1e6)))
    sizes = [(a.num_bytes / b.num_bytes) for a, b in zip(plain.parameters, parted.parameters, strict=True)]
    assert sizes == [1, 8, 1, 1, 1, 1]
    there_and_back = 2 * 7 / 8
    before, after = plain.seconds[KIND], parted.seconds[KIND]
    assert after.forward[1] - before.forward[1] == pytest.approx(there_and_back)
    assert after.input_grad[1] - before.input_grad[1] == pytest.approx(there_and_back)
    assert after.forward[2] == before.forward[2]
    # An eighth of the experts, so an eighth of the gradients to add up; the same number of tokens.
    assert before.weight_grad[1] - after.weight_grad[1] == pytest.approx(0.5 * 7 / 8)
    assert after.weight_grad[2] == before.weight_grad[2]


@pytest.mark.parametrize("sharding", ["none", "zero1", "fsdp"])
def test_experts_are_shared_by_the_ranks_that_have_the_same_ones(chain, sharding):
    parted = expert_parallel(with_experts(chain), with_experts(chain), Peers(4, Link()))
    (stage,) = stage_costs(parted, (), (KIND,))
    state, peak = TrainingState(8.0, 0.0), Peak(0.0, 1.0, 0.0, 0.0)
    need = rank_memory([stage], peak, state, Degrees(2, data=8, expert=4, sharding=sharding))
    experts = chain.parameters[1].num_elements / 4
    others = sum(parameter.num_elements for parameter in chain.parameters) - 4 * experts
    elements = others + experts if sharding == "none" else others / 8 + experts / 2
    assert need.optimizer == pytest.approx(8 * elements)
    weights = 4 * (others / 8 + experts / 2 if sharding == "fsdp" else others + experts)
    assert need.gradients == need.parameters == pytest.approx(weights)


def test_gathering_a_node_hides_behind_computing_it(chain):
    times = chain.seconds[KIND]
    sizes = [parameter.num_bytes for parameter in chain.parameters]
    rate = sizes[1] / times.forward[1]  # so that a block comes in 3 / 4 of its forward
    parted = fully_sharded(chain, Peers(4, Link(0.0, rate)), gradient_bytes=2.0)
    after = parted.seconds[KIND]
    assert after.forward[1] == times.forward[1]
    # The embedding computes a tenth of a block, and has more parameters.
    assert sizes[0] > sizes[1]
    assert after.forward[0] == pytest.approx(0.75 * sizes[0] / rate)
    both = [after.input_grad[0] + after.weight_grad[0], times.input_grad[0] + times.weight_grad[0]]
    # Its parameters come once more, and gradients of twice their size go.
    assert both[0] == pytest.approx(3 * 0.75 * sizes[0] / rate)
    assert both[0] > both[1]
    assert parted.forward_transient_bytes[1] == chain.forward_transient_bytes[1] + sizes[1] + sizes[2]
    assert fully_sharded(chain, Peers(), gradient_bytes=1.0) is chain


def test_what_is_gathered_node_by_node_is_not_there_at_once(chain):
    (stage,) = stage_costs(chain, (), (KIND,))
    state = TrainingState(8.0, 0.0)
    peak = Peak(0.0, 5.0, 0.0, 0.0)
    need = rank_memory([stage], peak, state, Degrees(data=4, sharding="fsdp"))
    assert need.parameters == stage.parameter_bytes / 4
    assert need.transients == 5.0


def test_peers_sum_within_hosts_first():
    cluster = parse_cluster("4x8xH100")
    peers = Peers.of(cluster, stride=2, count=16)
    assert (peers.num_near, peers.num_far) == (4, 4)
    assert (peers.near, peers.far) == (cluster.hosts[0].link, cluster.network)
    far_alone = Peers(1, Link(), 16, cluster.network)
    assert peers.all_reduce_seconds(1e9) < 0.5 * far_alone.all_reduce_seconds(1e9)
    # All but a sixteenth leaves the device either way; three quarters of it leave the host.
    assert peers.all_to_all_seconds(1e9) == pytest.approx(0.75e9 / 40e9 + 15e-6)
    assert far_alone.all_to_all_seconds(1e9) == pytest.approx(15 / 16 * 1e9 / 40e9 + 15e-6)


def test_recomputing_a_block_frees_its_own_and_costs_its_forward(chain):
    again = recomputed(chain, [1, 2])
    act = chain.cut_bytes[1]
    assert held(again) == held(chain) - 2 * 10 * act + 2 * act
    before, after = chain.seconds[KIND], again.seconds[KIND]
    assert after.input_grad[1] == before.input_grad[1] + before.forward[1]
    assert after.input_grad[3] == before.input_grad[3]
    backward = backward_transients(again, 0, chain.num_nodes)
    assert backward[1] == chain.backward_transient_bytes[1] + 10 * act
    assert recomputed(chain, []) is chain
    assert {unit.nodes for unit in by_worth(chain, KIND)} == {(1,), (2,), (3,), (4,)}


def test_of_what_nodes_hand_to_each_other_a_region_frees_what_only_it_keeps(chain):
    """Block 1 keeps what it is given and what it makes, which block 2 keeps too."""
    given, made = (Handed(100.0 * node, node - 1, (node,)) for node in (1, 2))
    saved = (Held(100.0, (1,), 0), Held(200.0, (1, 2), 1), Held(7.0, (1,)))
    handing = replace(chain, saved=saved, handed=(given, made))
    (unit,) = by_worth(handing, KIND)
    assert (unit.nodes, unit.freed_bytes) == ((1,), 7.0)  # it needs what it is given, block 2 what it makes
    again = recomputed(handing, [1])
    assert {(each.num_bytes, each.nodes) for each in again.saved} == {(100.0, (1,)), (200.0, (2,))}
    assert again.again_bytes[1] == 7.0 + 200.0


def test_what_is_held_by_two_stages_counts_in_both(chain):
    first, second = stage_costs(chain, (3,), (KIND, KIND))
    assert first.saved_bytes + second.saved_bytes == held(chain) + chain.cut_bytes[3]
    assert second.received_bytes == chain.cut_bytes[3]
    assert second.end == chain.num_nodes
    assert first.parameter_bytes + second.parameter_bytes == sum(p.num_bytes for p in chain.parameters)


@pytest.mark.parametrize("sharding", ["none", "zero1", "fsdp"])
def test_ranks_share_what_sharding_says(chain, sharding):
    (stage,) = stage_costs(chain, (), (KIND,))
    peak = Peak(100.0, 5.0, 0.0, 0.0)
    need = rank_memory([stage], peak, TrainingState(8.0, 0.0), Degrees(2, data=4, sharding=sharding))
    weights = stage.parameter_bytes
    assert need.optimizer == (2 * weights if sharding == "none" else weights / 2)
    assert need.gradients == need.parameters == (weights / 4 if sharding == "fsdp" else weights)
    gathered = 0.75 * weights if sharding == "fsdp" else 0.0
    assert need.transients == 5.0 + gathered
    assert need.allocated == pytest.approx(need.parameters * 2 + need.optimizer + need.transients + 100.0)


def test_an_update_that_needs_most_is_the_peak(chain):
    (stage,) = stage_costs(chain, (), (KIND,))
    weights = stage.parameter_bytes
    before_gradients = Peak(weights + 100.0, 0.0, 0.0, gradients=0.0)
    calm = rank_memory([stage], before_gradients, TrainingState(8.0, 0.0), Degrees())
    assert (calm.gradients, calm.activations) == (0.0, weights + 100.0)
    busy = rank_memory([stage], before_gradients, TrainingState(8.0, 4.0), Degrees())
    assert (busy.gradients, busy.activations, busy.transients) == (weights, 0.0, weights)
    assert busy.allocated == 5 * weights


@pytest.mark.parametrize("name", sorted(_REPEATS))
def test_a_schedule_holds_no_more_with_more_microbatches(name):
    draw = random.Random(name)
    for num_ranks, per_rank in ((2, 1), (4, 1), (3, 2), (4, 2), (2, 4)):
        many = 9 * num_ranks * per_rank
        choice = Choice(Degrees(num_ranks), per_rank, name, 1, many, "none")
        try:
            whole = catalog.get(name)(num_ranks, per_rank, many)
        except ConfigError:
            continue
        some = catalog.get(name)(*_sizes(choice)[1:])
        stages = whole.placement.num_stages
        saved = tuple(draw.uniform(1, 2) for _ in range(stages))
        costs = Costs(*[(1.0,) * stages] * 3, activation_bytes=saved, weight_grad_bytes=(0.5,) * stages)
        assert peak_bytes(some, costs) == pytest.approx(peak_bytes(whole, costs))
        assert some.num_microbatches < whole.num_microbatches


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v", "interleaved-1f1b"])
def test_stages_in_flight_add_up_to_the_rank_s_peak(name):
    per_rank = catalog.default_stages_per_rank(name)
    schedule = catalog.get(name)(4, per_rank, 8)
    stages = schedule.placement.num_stages
    costs = Costs(*[(1.0,) * stages] * 3, weight_grad_bytes=(0.25,) * stages)
    found = InFlight(schedule).microbatches(kept_share=0.25)
    sums = tuple(sum(found[stage] for stage in schedule.placement.stages_on(rank)) for rank in range(4))
    assert sums == pytest.approx(peak_bytes(schedule, costs))
    draw = random.Random(name)
    saved = tuple(draw.uniform(1, 2) for _ in range(stages))
    kept = tuple(draw.uniform(0, 1) for _ in range(stages))
    uneven = replace(costs, activation_bytes=saved, weight_grad_bytes=kept)
    peaks = InFlight(schedule).peaks(list(map(StageBytes, saved, kept)))
    assert [peak.total for peak in peaks] == pytest.approx(peak_bytes(schedule, uneven))


def test_transients_count_while_their_op_runs():
    # Rank 0 runs F0 F1 B0 F2 B1 B2, rank 1 F0 B0 F1 B1 F2 B2.
    flying = InFlight(catalog.get("1f1b")(2, 1, 3))
    first, last = flying.peaks(
        [StageBytes(10.0, backward_transient=4.0), StageBytes(10.0, forward_transient=4.0)]
    )
    assert (first.activations, first.transients) == (20.0, 4.0)
    assert (last.activations, last.transients) == (10.0, 4.0)


def test_gradients_are_there_from_the_first_backward_on():
    once, often = (
        InFlight(catalog.get("1f1b")(2, 1, number)).peaks([StageBytes(10.0, gradients=5.0)] * 2)
        for number in (2, 3)
    )
    assert [peak.gradients for peak in once] == [0.0, 5.0]  # rank 0 holds both before it goes back
    assert [peak.total for peak in often] == [25.0, 15.0]


@pytest.mark.parametrize(
    ("receives", "sends", "boundary"), [(0, 0, 0.0), (1, 0, 3.0), (4, 0, 6.0), (0, 1, 3.0)]
)
def test_parcels_have_memory_before_and_after(receives, sends, boundary):
    # The last rank runs F0 B0 F1 B1 F2 B2: at first two parcels are to come, and from F1 on one was sent.
    flying = InFlight(catalog.get("1f1b")(2, 1, 3), receives_ahead=receives, sends_ahead=sends)
    _, last = flying.peaks([StageBytes(10.0, sent=3.0), StageBytes(10.0, received=3.0)])
    assert last.boundary == boundary


def test_a_backward_frees_what_later_nodes_saved(chain):
    """The transient of a stage's first node comes when all but its own is gone."""
    heavy = replace(
        chain,
        saved=tuple(Held(8.0, (node,)) for node in range(chain.num_nodes)),
        backward_transient_bytes=(20.0, *[0.0] * (chain.num_nodes - 2), 5.0),
    )
    later = 8.0 * (chain.num_nodes - 1)
    (whole,) = stage_costs(heavy, (), (KIND,))
    assert whole.backward_transient_bytes == max(5.0, 20.0 - later)
    (late,) = stage_costs(heavy, (), (KIND,), splits=True)
    assert late == whole, "of the first stage a backward in two is whole"


def test_an_input_gradient_keeps_what_weight_gradients_take(chain):
    heavy = replace(
        chain,
        saved=tuple(Held(8.0, (node,)) for node in range(chain.num_nodes)),
        kept=tuple(Held(3.0, (node,)) for node in range(chain.num_nodes)),
        backward_transient_bytes=(0.0, 40.0, *[0.0] * (chain.num_nodes - 2)),
    )
    split = stage_costs(heavy, (1,), (KIND, KIND), splits=True)[1]
    later = chain.num_nodes - 2
    assert split.backward_transient_bytes == 40.0 - later * (8.0 - 3.0)
    assert split.weight_transient_bytes == max(p.num_bytes for p in chain.parameters if p.nodes[0])


def test_a_forward_has_not_saved_what_later_nodes_will(chain):
    """The first node's forward is over when later ones fill the memory."""
    light = replace(
        chain,
        saved=tuple(Held(8.0, (node,)) for node in range(chain.num_nodes)),
        forward_transient_bytes=(20.0, *[0.0] * (chain.num_nodes - 2), 5.0),
    )
    (whole,) = stage_costs(light, (), (KIND,))
    assert whole.forward_transient_bytes == max(5.0, 20.0 - 8.0 * (chain.num_nodes - 1))


def test_sizes_between_and_beyond_two_lie_on_their_line():
    of = language_model(parse_cluster(KIND), num_blocks=3)
    assert scaled(of(2), of(4), 8).seconds[KIND].forward == pytest.approx(of(8).seconds[KIND].forward)
    assert sum(h.num_bytes for h in scaled(of(2), of(4), 1).saved) == sum(h.num_bytes for h in of(1).saved)
    other = language_model(parse_cluster(KIND), num_blocks=4)
    with pytest.raises(ConfigError, match="2 rows and that with 4 are not alike"):
        scaled(of(2), other(4), 1)
    assert WIDTH == 64
