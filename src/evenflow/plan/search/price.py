"""What one choice would take and need: cut, scheduled, simulated, and held against the devices' memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evenflow.plan.chain import Chain, together
from evenflow.plan.choice import Choice, Degrees
from evenflow.plan.parallel import Peers, context_parallel, expert_parallel, fully_sharded, tensor_parallel
from evenflow.plan.recompute import all_worthwhile, recomputed
from evenflow.plan.request import Request
from evenflow.plan.search.fit import Fit, Group, fitted, groups_of
from evenflow.plan.search.selective import fitted_selectively
from evenflow.simulate import simulate


@dataclass(frozen=True, slots=True)
class Priced:
    """A choice, how it was cut, and what that takes. `idle`: of each rank, a share of the pipeline's time."""

    choice: Choice
    fit: Fit
    idle: tuple[float, ...]
    pipeline_seconds: float
    reduce_seconds: float  # sums of gradients: over data ranks, and of parameters that stages share
    update_seconds: float  # and what else a step takes once

    @property
    def step_seconds(self) -> float:
        """One step: the pipeline, the sum of gradients over data ranks, the optimizer's update."""
        return self.pipeline_seconds + self.reduce_seconds + self.update_seconds


def chain_for(request: Request, choice: Choice) -> Chain:
    """The program as one device of the choice's degrees sees it, without recomputation.

    Only parameters that are gathered node by node make a difference between ways to share them.
    """
    degrees, size = choice.degrees, choice.microbatch_size
    chain = _parted(request, degrees, size)
    if degrees.expert > 1:
        peers = Peers.of(request.cluster, stride=degrees.tensor * degrees.context, count=degrees.expert)
        chain = expert_parallel(chain, _parted(request, degrees, size * degrees.expert), peers)
    if degrees.gathers_nodes:
        peers = Peers.of(request.cluster, stride=degrees.tensor * degrees.context, count=degrees.data)
        chain = fully_sharded(chain, peers, gradient_bytes=request.state.gradient_bytes)
    return replace(chain, parameters=together(chain.parameters))


def _parted(request: Request, degrees: Degrees, num_rows: int) -> Chain:
    chain = request.chain_of(num_rows)
    chain = tensor_parallel(chain, Peers.of(request.cluster, stride=1, count=degrees.tensor))
    return context_parallel(chain, Peers.of(request.cluster, stride=degrees.tensor, count=degrees.context))


def price(request: Request, choice: Choice, chain: Chain) -> Priced:
    """Cut, schedule and simulate one choice; `chain` is `chain_for` it.

    Raises `DoesNotFitError` where no cut fits into memory, and `ConfigError` for a schedule that can't serve
    these sizes, or a chain with too few places to cut.
    """
    return priced_fit(request, choice, _cut(request, choice, chain))


def _cut(request: Request, choice: Choice, chain: Chain) -> Fit:
    match choice.recompute:
        case "none":
            return fitted(request, choice, chain)
        case "full":
            return fitted(request, choice, recomputed(chain, all_worthwhile(chain)))
        case "selective":
            return fitted_selectively(request, choice, chain)


def priced_fit(request: Request, choice: Choice, fit: Fit) -> Priced:
    """Schedule and simulate a choice as it was cut."""
    makespan = simulate(fit.schedule, fit.flow, fit.costs).makespan_seconds
    work = fit.costs.work_seconds(fit.schedule.placement, choice.num_microbatches, trains=True)
    return Priced(
        choice,
        fit,
        idle=tuple(max(0.0, 1 - each / makespan) for each in work),
        pipeline_seconds=makespan,
        reduce_seconds=fit.shared_seconds + _reduce_seconds(request, choice.degrees, fit),
        update_seconds=request.overheads.step_seconds + _update_seconds(request, fit),
    )


def _reduce_seconds(request: Request, degrees: Degrees, fit: Fit) -> float:
    """The longest that a pipeline rank's data ranks take to sum their gradients; nothing of it is hidden."""
    found = []
    for rank in range(degrees.pipeline):
        own = fit.stages_on(rank)
        of_experts = sum(stage.expert_trained_bytes for stage in own)
        others = sum(stage.trained_bytes for stage in own) - of_experts
        found.append(_sum_seconds(request, degrees, others, of_experts))
    return max(found)


def _sum_seconds(request: Request, degrees: Degrees, others_bytes: float, expert_bytes: float) -> float:
    """How long data ranks take to sum gradients; those of experts only where the experts are the same."""
    if degrees.data == 1:
        return 0.0
    stride = degrees.tensor * degrees.context
    if degrees.gathers_nodes:
        others_bytes = 0.0  # summed on the way (`parallel.fully_sharded`)
    everyone = Peers.of(request.cluster, stride=stride, count=degrees.data)
    alike = Peers.of(
        request.cluster, stride=stride * degrees.expert, count=degrees.num_alike(are_experts=True)
    )
    factor = request.state.gradient_bytes
    return everyone.all_reduce_seconds(factor * others_bytes) + alike.all_reduce_seconds(
        factor * expert_bytes
    )


def mean_sum_seconds(request: Request, degrees: Degrees, chain: Chain) -> float:
    """How long data ranks take to sum gradients, if every pipeline rank has as many of them."""
    trained = [parameter for parameter in chain.parameters if parameter.trains]
    others, experts = (
        sum(each.num_bytes for each in trained if each.is_expert is experts) / degrees.pipeline
        for experts in (False, True)
    )
    return _sum_seconds(request, degrees, others, experts)


def _update_seconds(request: Request, fit: Fit) -> float:
    """The longest update, as measured; else parameters and states are read and written, gradients read."""
    rates = {device.name: device.memory_bytes_per_second for device in request.cluster.devices}
    found = []
    for rank, (need, group) in enumerate(zip(fit.memory, fit.groups, strict=True)):
        measured = request.update_seconds_per_byte.get(group.kind)
        if measured is None:
            found.append((2 * (need.gradients + need.optimizer) + need.gradients) / rates[group.kind])
        else:
            found.append(sum(stage.trained_bytes for stage in fit.stages_on(rank)) * measured)
    return max(found)


def lower_bound(request: Request, choice: Choice, chain: Chain) -> float:
    """Seconds that no cut, no schedule and no saving of memory of this choice can beat.

    Each microbatch takes the most loaded rank at least `least_load`. In a pipeline, the gradients that a rank
    must sum besides are at least the mean of all ranks.
    """
    load = least_load(chain, groups_of(request.cluster, choice.degrees))
    if choice.degrees.pipeline == 1:
        return choice.num_microbatches * load
    return choice.num_microbatches * load + mean_sum_seconds(request, choice.degrees, chain)


def least_load(chain: Chain, groups: Sequence[Group]) -> float:
    """What the most loaded of some devices computes at least for one microbatch, wherever the chain is cut.

    It is the mean if work is dealt out by speed, or more where nodes are few: of as many nodes as there are
    devices, and one more, two share a device; and so on.

    >>> from evenflow.plan.chain import Seconds
    >>> times = Seconds((4.0, 4.0, 4.0, 1.0), (0.0,) * 4, (0.0,) * 4)
    >>> chain = Chain(("a",) * 4, 1, (1.0,) * 4, {"cpu": times})
    >>> least_load(chain, [Group(rank, "cpu", 1.0) for rank in range(2)])
    8.0
    """
    totals = {kind: seconds.total for kind, seconds in chain.seconds.items()}
    mean = 1 / sum(1 / max(sum(totals[group.kind]), 1e-30) for group in groups)
    fastest = zip(*(totals[kind] for kind in {group.kind for group in groups}), strict=True)
    heaviest: list[float] = sorted((min(times) for times in fastest), reverse=True)
    crowded = (-(-count // len(groups)) * each for count, each in enumerate(heaviest, 1))
    return max(mean, *crowded)
