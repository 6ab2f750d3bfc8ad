"""A choice's program, cut so that it fits: the stages, and what each rank then needs.

What a rank may hold decides the cut, the cut decides what the schedule holds, and that decides how much is
left: so a cut that turns out not to fit is made again for devices that much smaller, until it fits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from evenflow.cluster.cluster import Cluster
from evenflow.ir.costs import Costs, Link
from evenflow.ir.flow import Flow
from evenflow.ir.schedule import Schedule
from evenflow.plan.chain import Chain, Held
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.costs.in_flight import InFlight, StageBytes
from evenflow.plan.costs.offload import offloaded
from evenflow.plan.costs.overheads import as_run
from evenflow.plan.costs.shared import shared_seconds
from evenflow.plan.costs.stages import StageCost, costs_of, stage_costs
from evenflow.plan.costs.traffic import Parcels, traffic_of
from evenflow.plan.cuts.partition import partition
from evenflow.plan.cuts.problem import DoesNotFitError, Kind, Partition, PartitionProblem
from evenflow.plan.rank_memory import RankMemory, rank_memory
from evenflow.plan.recompute import again_nodes, transients
from evenflow.plan.request import Request
from evenflow.plan.search.scheduled import (
    in_flight,
    in_flight_of,
    microbatches_in_flight,
    schedule_of,
    splits,
)


@dataclass(frozen=True, slots=True)
class Group:
    """The devices of one pipeline rank: they have one kind, the slowest, and the least memory among them.

    `communicator_bytes` are for each of the two ways between it and another pipeline rank.
    """

    first: int  # its first device's rank in the cluster
    kind: str
    cap_bytes: float
    communicator_bytes: float = 0.0


def groups_of(cluster: Cluster, degrees: Degrees) -> tuple[Group, ...]:
    """The devices of each pipeline rank: tensor ranks closest together, pipeline ranks farthest apart."""
    width = degrees.num_devices // degrees.pipeline
    found = []
    for first in range(0, degrees.num_devices, width):
        devices = {id(each): each for each in cluster.devices[first : first + width]}.values()
        slowest = min(devices, key=lambda device: max(device.flops_per_second.values()) * device.efficiency)
        room = min(device.room_bytes for device in devices)
        ways = max(device.communicator_bytes for device in devices)
        found.append(Group(first, slowest.name, room, ways))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Fit:
    """A chain that is cut, the schedule's costs with it, and what each rank needs.

    `groups[rank]` has a rank's devices; `shared_seconds` are a step's for parameters that several ranks use.
    """

    chain: Chain
    positions: tuple[int, ...]
    groups: tuple[Group, ...]
    schedule: Schedule
    flow: Flow
    stages: tuple[StageCost, ...]
    costs: Costs
    memory: tuple[RankMemory, ...]
    shared_seconds: float

    @property
    def over_bytes(self) -> tuple[float, ...]:
        """How much each rank needs beyond what it has; negative where it has more."""
        return tuple(
            need.allocated - group.cap_bytes for need, group in zip(self.memory, self.groups, strict=True)
        )

    @property
    def load_seconds(self) -> tuple[float, ...]:
        """What each rank computes for one microbatch."""
        return tuple(sum(stage.seconds for stage in self.stages_on(rank)) for rank in range(len(self.groups)))

    @property
    def again(self) -> tuple[int, ...]:
        """The nodes that are recomputed, ascending."""
        return again_nodes(self.chain)

    def stages_on(self, rank: int) -> list[StageCost]:
        """The stages of a pipeline rank."""
        return [self.stages[stage] for stage in self.schedule.placement.stages_on(rank)]


def fitted(
    request: Request,
    choice: Choice,
    chain: Chain,
    *,
    groups: Sequence[Group] = (),
    slower: Sequence[float] = (),
) -> Fit:
    """Cut so that every rank fits, and the most loaded one does as little as possible.

    `groups` and `slower` say which devices the ranks have, and how many times as long as the chain says each
    takes; by default the cluster's, in the best order, none of them slower. Raises `DoesNotFitError` where no
    cut fits, and `ConfigError` for a schedule that cannot serve these sizes.
    """
    own = tuple(groups) or groups_of(request.cluster, choice.degrees)
    refuse_at_once(request, choice, chain)
    caps = [group.cap_bytes for group in own]
    while True:
        kinds = [
            Kind(group.kind, _times(chain.seconds[group.kind].total, factor), cap)
            for group, cap, factor in zip(own, caps, slower or (1.0,) * len(own), strict=True)
        ]
        cut = _cut(request, choice, chain, kinds, own, any_order=not groups)
        fit = at_cuts(request, choice, chain, cut.positions, [own[device] for device in cut.devices])
        if max(fit.over_bytes) <= 0:
            return fit
        for rank, excess in enumerate(fit.over_bytes):
            # At least a thousandth, so that it ends; what is left then is too little for anything.
            caps[cut.devices[rank]] -= max(excess, fit.groups[rank].cap_bytes * 1e-3) if excess > 0 else 0.0
        if min(caps) <= 0:
            rank = fit.over_bytes.index(max(fit.over_bytes))
            raise _lacking(fit.groups[rank], rank, fit.memory[rank].allocated)


def at_cuts(
    request: Request,
    choice: Choice,
    chain: Chain,
    positions: Sequence[int],
    groups: Sequence[Group],
    *,
    schedule: Schedule | None = None,
    offloads: bool = False,
) -> Fit:
    """What comes of these cuts, whether it fits or not; `groups[rank]` has a rank's devices.

    `schedule` is the choice's, unless another is given; `offloads`: activations wait on the host.
    """
    if schedule is None:
        schedule, held = schedule_of(choice), in_flight(choice, request.overheads)
    else:
        held = in_flight_of(schedule, request.overheads)
    rank_of = schedule.placement.rank_of
    in_two = splits(schedule)
    stages = stage_costs(chain, positions, [groups[rank].kind for rank in rank_of], splits=in_two)
    stages = offloaded(stages, chain) if offloads else stages
    traffic = traffic_of(chain, positions)
    parcels = traffic.parcels(rank_of)
    stages = as_run(stages, parcels, request.overheads, splits=in_two)
    pairs = traffic.rank_pairs(rank_of)
    costs = costs_of(stages, traffic, _links(request.cluster, groups, pairs))
    num_ways = [sum(rank in pair for pair in pairs if pair[0] != pair[1]) for rank in range(len(groups))]
    ways_bytes = [n * group.communicator_bytes for n, group in zip(num_ways, groups, strict=True)]
    memory = _memory(request, choice.degrees, held, stages, parcels, ways_bytes)
    exchange = shared_seconds(
        chain.parameters,
        positions,
        rank_of,
        partial(_link, request.cluster, groups),
        gradient_bytes=request.state.gradient_bytes,
    )
    return Fit(
        chain, tuple(positions), tuple(groups), schedule, traffic.flow, stages, costs, memory, exchange
    )


def refuse_at_once(request: Request, choice: Choice, chain: Chain) -> None:
    """Refuse what no cut can help: more than all devices together hold, wherever the cuts are.

    Raises `DoesNotFitError`, and `ConfigError` for a schedule that cannot serve these sizes.
    """
    groups = groups_of(request.cluster, choice.degrees)
    needed_bytes = sum(held.num_bytes for held in static_bytes(request, choice.degrees, chain))
    fewest = min(microbatches_in_flight(choice, chain, request.overheads))
    needed_bytes += fewest * sum(held.num_bytes for held in chain.saved)
    if needed_bytes > sum(group.cap_bytes for group in groups):
        least = min(range(len(groups)), key=lambda rank: groups[rank].cap_bytes)
        raise _lacking(groups[least], least, needed_bytes / len(groups))


def _lacking(group: Group, rank: int, needed_bytes: float) -> DoesNotFitError:
    return DoesNotFitError(
        rank, group.kind, needed_bytes=needed_bytes, cap_bytes=group.cap_bytes, is_proven=False
    )


def _cut(
    request: Request,
    choice: Choice,
    chain: Chain,
    kinds: Sequence[Kind],
    groups: Sequence[Group],
    *,
    any_order: bool,
) -> Partition:
    ring = [(rank, (rank + 1) % len(groups)) for rank in range(len(groups))]
    links = _links(request.cluster, groups, (*ring, *(pair[::-1] for pair in ring))).values()
    rate = min((link.bytes_per_second for link in links), default=float("inf"))
    problem = PartitionProblem(
        schedule_of(choice).placement,
        tuple(kinds),
        chain.legal,
        chain.cut_bytes,
        cut_seconds=tuple(size / rate for size in chain.cut_bytes),
        static=static_bytes(request, choice.degrees, chain),
        held=chain.saved,
        transient_bytes=transients(chain),
        in_flight=microbatches_in_flight(choice, chain, request.overheads),
        any_order=any_order
        and len({(group.kind, group.cap_bytes) for group in groups}) > 1
        and len(groups) <= 8,
    )
    try:
        return partition(problem)
    except DoesNotFitError as error:  # tell of what the device has, not of what an earlier round left
        group = max((group for group in groups if group.kind == error.kind), key=lambda each: each.cap_bytes)
        needed_bytes = error.needed_bytes + group.cap_bytes - error.cap_bytes
        raise _lacking(group, error.rank, needed_bytes) from None


def _times(seconds: Sequence[float], factor: float) -> tuple[float, ...]:
    return tuple(each * factor for each in seconds)


def static_bytes(request: Request, degrees: Degrees, chain: Chain) -> tuple[Held, ...]:
    """What parameters cost wherever they are: themselves, their gradients, the optimizer's states."""
    state = request.state
    found = []
    for parameter in chain.parameters:
        whole = degrees.parameter_shards(are_experts=parameter.is_expert)
        states = degrees.state_shards(are_experts=parameter.is_expert)
        # A pipeline gathers all of a stage's for the step.
        size = parameter.num_bytes / (whole if degrees.gathers_nodes and not parameter.is_expert else 1)
        if parameter.trains:
            size += parameter.num_bytes * state.gradient_bytes / whole
            # The first stage that uses it updates it.
            found.append(Held(parameter.num_elements * state.optimizer_bytes / states, parameter.nodes[:1]))
        found.append(Held(size, parameter.nodes))
    return tuple(found)


def _links(
    cluster: Cluster, groups: Sequence[Group], pairs: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Link]:
    """The links between pairs of pipeline ranks, from one to the other."""
    return {(a, b): _link(cluster, groups, a, b) for a, b in pairs if a != b}


def _link(cluster: Cluster, groups: Sequence[Group], source: int, target: int) -> Link:
    return cluster.link_between(groups[source].first, groups[target].first)


def _memory(
    request: Request,
    degrees: Degrees,
    held: InFlight,
    stages: Sequence[StageCost],
    parcels: Sequence[Parcels],
    communicator_bytes: Sequence[float],
) -> tuple[RankMemory, ...]:
    sizes = [
        _stage_bytes(stage, own, request.state.gradient_bytes)
        for stage, own in zip(stages, parcels, strict=True)
    ]
    return tuple(
        rank_memory(
            [stages[stage] for stage in held.placement.stages_on(rank)],
            peak,
            request.state,
            degrees,
            communicator_bytes=communicator_bytes[rank],
        )
        for rank, peak in enumerate(held.peaks(sizes))
    )


def _stage_bytes(stage: StageCost, parcels: Parcels, gradient_bytes: float) -> StageBytes:
    return StageBytes(
        saved=stage.saved_bytes,
        kept=stage.kept_bytes,
        forward_transient=stage.forward_transient_bytes,
        backward_transient=stage.backward_transient_bytes,
        received=sum(parcels.received),
        sent=sum(parcels.sent),
        gradients=stage.trained_bytes * gradient_bytes,
        weight_transient=stage.weight_transient_bytes,
    )
