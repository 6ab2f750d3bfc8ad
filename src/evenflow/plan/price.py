"""What one choice would take and need: cut, scheduled, simulated, and held against the devices' memory.

What a rank may hold decides the cut, the cut decides what the schedule holds, and that decides how much is
left: so a cut that turns out not to fit is made again for devices that much smaller, until it fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from evenflow.cluster.cluster import Cluster
from evenflow.ir.costs import Costs, Link
from evenflow.ir.flow import Flow
from evenflow.ir.schedule import Schedule
from evenflow.memory import peak_bytes
from evenflow.plan.chain import Chain, Held
from evenflow.plan.in_flight import in_flight
from evenflow.plan.parallel import (
    Peers,
    context_parallel,
    expert_parallel,
    tensor_parallel,
)
from evenflow.plan.partition import partition
from evenflow.plan.plan import Degrees
from evenflow.plan.problem import DoesNotFitError, Kind, Partition, PartitionProblem
from evenflow.plan.rank_memory import RankMemory, rank_memory
from evenflow.plan.recompute import by_worth, recomputed
from evenflow.plan.request import Choice, Request
from evenflow.plan.stages import StageCost, costs_of, stage_costs
from evenflow.schedules import catalog
from evenflow.simulate import simulate

_REPEATS = frozenset(
    {"1f1b", "zb-h1", "zb-h2", "interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"}
)


@dataclass(frozen=True, slots=True)
class Group:
    """The devices of one pipeline rank: they have one kind, the slowest, and the least memory among them."""

    first: int  # its first device's rank in the cluster
    kind: str
    cap_bytes: float


@dataclass(frozen=True, slots=True)
class Priced:
    """A choice, how it came out, and what that takes. `groups[rank]` has the devices of a pipeline rank."""

    choice: Choice
    positions: tuple[int, ...]
    recompute: tuple[int, ...]  # nodes
    groups: tuple[Group, ...]
    schedule: Schedule
    stages: tuple[StageCost, ...]
    memory: tuple[RankMemory, ...]
    idle: tuple[float, ...]
    pipeline_seconds: float
    reduce_seconds: float
    update_seconds: float

    @property
    def step_seconds(self) -> float:
        """One step: the pipeline, the sum of gradients over data ranks, the optimizer's update."""
        return self.pipeline_seconds + self.reduce_seconds + self.update_seconds


def groups_of(cluster: Cluster, degrees: Degrees) -> tuple[Group, ...]:
    """The devices of each pipeline rank: tensor ranks closest together, pipeline ranks farthest apart."""
    width = degrees.num_devices // degrees.pipeline
    found = []
    for first in range(0, degrees.num_devices, width):
        devices = cluster.devices[first : first + width]
        slowest = min(devices, key=lambda device: max(device.flops_per_second.values()) * device.efficiency)
        room = min(device.memory_bytes - device.reserved_bytes for device in devices)
        found.append(Group(first, slowest.name, room))
    return tuple(found)


def chain_for(request: Request, choice: Choice) -> Chain:
    """The program as one device of the choice's degrees sees it, without recomputation."""
    degrees, size = choice.degrees, choice.microbatch_size
    chain = _parted(request, degrees, size)
    if degrees.expert == 1:
        return chain
    peers = Peers.of(request.cluster, stride=degrees.tensor * degrees.context, count=degrees.expert)
    return expert_parallel(chain, _parted(request, degrees, size * degrees.expert), peers)


def _parted(request: Request, degrees: Degrees, num_rows: int) -> Chain:
    peers = Peers.of(request.cluster, stride=1, count=degrees.tensor)
    chain = tensor_parallel(request.chain_of(num_rows), peers)
    return context_parallel(
        chain, degrees.context, _slowest(request.cluster, degrees.tensor, degrees.context)
    )


def _slowest(cluster: Cluster, stride: int, count: int) -> Link:
    """The slowest link of a ring over `count` devices that are `stride` apart, from the first on."""
    ranks = [stride * number for number in range(count)]
    links = [cluster.link_between(a, b) for a, b in pairwise(ranks)]
    return min(links, key=lambda link: link.bytes_per_second, default=Link())


def price(request: Request, choice: Choice, chain: Chain) -> Priced:
    """Cut, schedule and simulate one choice; `chain` is `chain_for` it.

    Raises `DoesNotFitError` where no cut fits into memory, and `ConfigError` for a schedule that can't serve
    these sizes, or a chain with too few places to cut.
    """
    match choice.recompute:
        case "none":
            nodes: Sequence[int] = ()
        case "full":
            nodes = range(chain.num_nodes)
        case _:
            nodes = _fewest_that_fit(request, choice, chain)
    fit = _fitted(request, choice, recomputed(chain, nodes))
    schedule, costs = fit.schedule, fit.costs
    makespan = simulate(schedule, Flow.chain(len(fit.stages)), costs).makespan_seconds
    work = costs.work_seconds(schedule.placement, choice.num_microbatches, trains=True)
    return Priced(
        choice,
        fit.positions,
        tuple(nodes),
        fit.groups,
        schedule,
        fit.stages,
        fit.memory,
        idle=tuple(1 - each / makespan for each in work),
        pipeline_seconds=makespan,
        reduce_seconds=_reduce_seconds(request, choice.degrees, schedule, fit.stages),
        update_seconds=_update_seconds(request, fit.memory, fit.groups),
    )


def _fewest_that_fit(request: Request, choice: Choice, chain: Chain) -> Sequence[int]:
    """As few nodes as must be recomputed, those first that free most bytes for each second."""
    worth = by_worth(chain, groups_of(request.cluster, choice.degrees)[0].kind)
    _fitted(request, choice, recomputed(chain, worth))  # all of them must do
    low, high = 0, len(worth)
    while low < high:
        middle = (low + high) // 2
        try:
            _fitted(request, choice, recomputed(chain, worth[:middle]))
            high = middle
        except DoesNotFitError:
            low = middle + 1
    return worth[:high]


@dataclass(frozen=True, slots=True)
class _Fit:
    """A cut that fits, and the schedule's costs with it."""

    positions: tuple[int, ...]
    groups: tuple[Group, ...]
    schedule: Schedule
    stages: tuple[StageCost, ...]
    costs: Costs
    memory: tuple[RankMemory, ...]


def _fitted(request: Request, choice: Choice, chain: Chain) -> _Fit:
    groups = groups_of(request.cluster, choice.degrees)
    schedule = _schedule(
        choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, choice.num_microbatches
    )
    caps = [group.cap_bytes for group in groups]
    _refuse_at_once(request, choice, chain, groups)
    while True:
        cut = _cut(request, choice, chain, schedule, groups, caps)
        placed = tuple(groups[device] for device in cut.devices)
        stages = stage_costs(chain, cut.positions, [placed[r].kind for r in schedule.placement.rank_of])
        costs = costs_of(stages, _links(request.cluster, placed))
        memory = _memory(request, choice, schedule, stages, costs)
        over = [need.allocated - group.cap_bytes for need, group in zip(memory, placed, strict=True)]
        if max(over) <= 0:
            return _Fit(cut.positions, placed, schedule, stages, costs, memory)
        for rank, excess in enumerate(over):
            # At least a thousandth, so that it ends; what is left then is too little for anything.
            caps[cut.devices[rank]] -= max(excess, placed[rank].cap_bytes * 1e-3) if excess > 0 else 0.0
        if min(caps) <= 0:
            rank = over.index(max(over))
            raise _lacking(placed[rank], rank, memory[rank].allocated)


def _refuse_at_once(request: Request, choice: Choice, chain: Chain, groups: Sequence[Group]) -> None:
    """Refuse what no cut can help: more than all devices together hold, wherever the cuts are."""
    least_held = min(in_flight_of(choice, chain))
    needed_bytes = sum(held.num_bytes for held in _static(request, choice.degrees, chain))
    needed_bytes += least_held * sum(held.num_bytes for held in chain.saved)
    if needed_bytes > sum(group.cap_bytes for group in groups):
        least = min(range(len(groups)), key=lambda rank: groups[rank].cap_bytes)
        raise _lacking(groups[least], least, needed_bytes / len(groups))


def in_flight_of(choice: Choice, chain: Chain) -> tuple[float, ...]:
    """How many microbatches each stage holds at its rank's peak."""
    saved, kept = (sum(each.num_bytes for each in held) for held in (chain.saved, chain.kept))
    return _in_flight(*_sizes(choice), round(min(kept / saved, 1.0), 2) if saved else 1.0)


def _lacking(group: Group, rank: int, needed_bytes: float) -> DoesNotFitError:
    return DoesNotFitError(rank, Kind(group.kind, (), group.cap_bytes), needed_bytes, is_proven=False)


@lru_cache(maxsize=64)
def _schedule(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> Schedule:
    return catalog.get(name)(num_ranks, stages_per_rank, num_microbatches)


@lru_cache(maxsize=256)
def _in_flight(
    name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int, kept_share: float
) -> tuple[float, ...]:
    return in_flight(_schedule(name, num_ranks, stages_per_rank, num_microbatches), kept_share=kept_share)


def _sizes(choice: Choice) -> tuple[str, int, int, int]:
    """What makes the schedule in which the activations are counted.

    After some rounds a schedule repeats itself, and holds no more: those rounds are enough.
    """
    per_round = choice.degrees.pipeline * choice.stages_per_rank
    enough = 4 * per_round if choice.schedule in _REPEATS else choice.num_microbatches
    number = min(choice.num_microbatches, enough)
    return choice.schedule, choice.degrees.pipeline, choice.stages_per_rank, number


def _cut(
    request: Request,
    choice: Choice,
    chain: Chain,
    schedule: Schedule,
    groups: Sequence[Group],
    caps: Sequence[float],
) -> Partition:
    links = _links(request.cluster, groups).values()
    rate = min((link.bytes_per_second for link in links), default=float("inf"))
    problem = PartitionProblem(
        schedule.placement,
        tuple(
            Kind(group.kind, chain.seconds[group.kind].total, cap)
            for group, cap in zip(groups, caps, strict=True)
        ),
        chain.legal,
        chain.cut_bytes,
        cut_seconds=tuple(size / rate for size in chain.cut_bytes),
        static=_static(request, choice.degrees, chain),
        held=chain.saved,
        transient_bytes=tuple(map(max, chain.forward_transient_bytes, chain.backward_transient_bytes)),
        in_flight=in_flight_of(choice, chain),
        any_order=len({(group.kind, group.cap_bytes) for group in groups}) > 1 and len(groups) <= 8,
    )
    try:
        return partition(problem)
    except DoesNotFitError as error:  # tell of what the device has, not of what an earlier round left
        group = max(
            (group for group in groups if group.kind == error.kind.name), key=lambda each: each.cap_bytes
        )
        needed_bytes = error.needed_bytes + group.cap_bytes - error.kind.cap_bytes
        raise _lacking(group, error.rank, needed_bytes) from None


def _static(request: Request, degrees: Degrees, chain: Chain) -> tuple[Held, ...]:
    """What parameters cost wherever they are: themselves, their gradients, the optimizer's states."""
    state = request.state
    found = []
    for parameter in chain.parameters:
        shared = degrees.data // degrees.expert if parameter.is_expert else degrees.data
        whole = shared if degrees.sharding == "fsdp" else 1
        states = shared if degrees.sharding != "none" else 1
        size = float(parameter.num_bytes)  # with "fsdp" all of a stage's are gathered for the step
        if parameter.trains:
            size += parameter.num_bytes * state.gradient_bytes / whole
            size += parameter.num_elements * state.optimizer_bytes / states
        found.append(Held(size, parameter.nodes))
    return tuple(found)


def _links(cluster: Cluster, groups: Sequence[Group]) -> dict[tuple[int, int], Link]:
    """The links between neighbours among the pipeline ranks, the last and the first too, both ways."""
    pairs = [(rank, (rank + 1) % len(groups)) for rank in range(len(groups)) if len(groups) > 1]
    return {
        (a, b): cluster.link_between(groups[a].first, groups[b].first)
        for pair in pairs
        for a, b in (pair, pair[::-1])
    }


def _memory(
    request: Request, choice: Choice, schedule: Schedule, stages: Sequence[StageCost], costs: Costs
) -> tuple[RankMemory, ...]:
    peaks = peak_bytes(_schedule(*_sizes(choice)), costs)
    return tuple(
        rank_memory(
            [stages[stage] for stage in schedule.placement.stages_on(rank)],
            peak,
            request.state,
            data_ranks=choice.degrees.data,
            expert_ranks=choice.degrees.expert,
            sharding=choice.degrees.sharding,
        )
        for rank, peak in enumerate(peaks)
    )


def _reduce_seconds(
    request: Request, degrees: Degrees, schedule: Schedule, stages: Sequence[StageCost]
) -> float:
    """The longest that a pipeline rank's data ranks take to sum their gradients; nothing of it is hidden.

    Those of experts are summed over the ranks that have the same ones.
    """
    stride = degrees.tensor * degrees.context
    everyone = Peers.of(request.cluster, stride=stride, count=degrees.data)
    alike = Peers.of(request.cluster, stride=stride * degrees.expert, count=degrees.data // degrees.expert)

    def seconds(own: Sequence[StageCost]) -> float:
        experts = sum(stage.expert_trained_bytes for stage in own)
        others = sum(stage.trained_bytes for stage in own) - experts
        factor = request.state.gradient_bytes
        return everyone.all_reduce_seconds(factor * others) + alike.all_reduce_seconds(factor * experts)

    placement = schedule.placement
    return max(
        seconds([stages[stage] for stage in placement.stages_on(rank)]) for rank in range(placement.num_ranks)
    )


def _update_seconds(request: Request, memory: Sequence[RankMemory], groups: Sequence[Group]) -> float:
    """The longest update: parameters and states are read and written, gradients read."""
    rates = {device.name: device.memory_bytes_per_second for device in request.cluster.devices}
    return max(
        (2 * (need.gradients + need.optimizer) + need.gradients) / rates[group.kind]
        for need, group in zip(memory, groups, strict=True)
    )


# What fill and drain add with equal ops: for each further rank so much of one microbatch's work on a rank.
_FILL = {
    "zb-h1": 1 / 3,
    "zb-h2": 1 / 3,
    "interleaved-zb": 1 / 3,
    "zb-v": 1 / 3,
    "v-half": 2 / 3,
    "v-min": 1.0,
}


def stretch_of(choice: Choice) -> float:
    """How many times as long as its work a choice's schedule takes if all ops are equal, at the least.

    >>> stretch_of(Choice(Degrees(pipeline=2), 1, "1f1b", 1, 4, "none"))
    1.25
    """
    fill = _FILL.get(choice.schedule, 1.0) / choice.stages_per_rank
    return 1 + fill * (choice.degrees.pipeline - 1) / choice.num_microbatches


def lower_bound(request: Request, choice: Choice, chain: Chain) -> float:
    """Seconds that no cut and no schedule of this choice can beat: all work, spread without a loss."""
    groups = groups_of(request.cluster, choice.degrees)
    totals = {kind: sum(seconds.total) for kind, seconds in chain.seconds.items()}
    speed = sum(1 / totals[group.kind] for group in groups)
    return choice.num_microbatches / speed
