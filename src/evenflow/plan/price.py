"""What one choice would take and need: cut, scheduled, simulated, and held against the devices' memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evenflow.cluster.cluster import Cluster
from evenflow.ir.costs import Link
from evenflow.ir.flow import Flow
from evenflow.ir.schedule import Schedule
from evenflow.plan.chain import Chain
from evenflow.plan.fit import Group, fitted, groups_of
from evenflow.plan.parallel import Peers, context_parallel, expert_parallel, tensor_parallel
from evenflow.plan.plan import Degrees
from evenflow.plan.rank_memory import RankMemory
from evenflow.plan.recompute import recomputed
from evenflow.plan.request import Choice, Request
from evenflow.plan.selective import fitted_selectively
from evenflow.plan.stages import StageCost
from evenflow.simulate import simulate


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
        chain, degrees.context, slowest_link(request.cluster, degrees.tensor, degrees.context)
    )


def slowest_link(cluster: Cluster, stride: int, count: int) -> Link:
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
            nodes: tuple[int, ...] = ()
            fit = fitted(request, choice, chain)
        case "full":
            nodes = tuple(range(chain.num_nodes))
            fit = fitted(request, choice, recomputed(chain, nodes))
        case _:
            nodes, fit = fitted_selectively(request, choice, chain)
    schedule, costs = fit.schedule, fit.costs
    makespan = simulate(schedule, Flow.chain(len(fit.stages)), costs).makespan_seconds
    work = costs.work_seconds(schedule.placement, choice.num_microbatches, trains=True)
    return Priced(
        choice,
        fit.positions,
        nodes,
        fit.groups,
        schedule,
        fit.stages,
        fit.memory,
        idle=tuple(1 - each / makespan for each in work),
        pipeline_seconds=makespan,
        reduce_seconds=_reduce_seconds(request, choice.degrees, schedule, fit.stages),
        update_seconds=_update_seconds(request, fit.memory, fit.groups),
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
