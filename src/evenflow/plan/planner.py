"""The planner: price every choice that could be the best, and say how far the best is from what is possible.

The space: over how many devices the pipeline, the data, tensors, experts and contexts go, how many stages a
rank holds and where, which schedule, the size of a microbatch, what is recomputed. One pipeline stage with
plain or sharded data parallelism is always among the choices, so that the answer may be not to pipeline.

Choices are priced in the order of their lower bounds, and no further than where a bound exceeds the best that
was found: what is not priced could not have won (branch and bound, Land & Doig, 1960).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evenflow.errors import ConfigError, EvenflowError
from evenflow.plan.chain import Chain
from evenflow.plan.plan import (
    Degrees,
    Plan,
    PlannedRank,
    PlannedStage,
    Prediction,
    RunnerUp,
    node_labels,
)
from evenflow.plan.price import Priced, chain_for, lower_bound, price
from evenflow.plan.problem import DoesNotFitError
from evenflow.plan.request import Choice, Request

# By stages per rank: the schedules worth pricing. The others are never faster, nor hold less.
_SCHEDULES = {
    1: ("1f1b", "zb-h1", "zb-h2"),
    2: ("interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"),
    4: ("interleaved-1f1b", "interleaved-zb"),
}
_RECOMPUTE = ("none", "selective", "full")
_SHARDINGS = ("none", "zero1", "fsdp")
_MOST_MICROBATCHES = 512  # of a choice of the planner's own; the user may ask for more
_NUM_RUNNERS_UP = 5

Progress = Callable[[int, int, float], None]  # choices seen, of all, best seconds so far


class NoPlanError(ConfigError):
    """No choice fits; `nearest` is the one that lacks least, `needed_bytes` on a device of `cap_bytes`."""

    def __init__(self, nearest: Choice, error: DoesNotFitError) -> None:
        super().__init__(f"no plan fits into memory; the nearest: {describe(nearest)}: {error}")
        self.nearest = nearest
        self.needed_bytes = error.needed_bytes
        self.cap_bytes = error.kind.cap_bytes


def plan(request: Request, *, progress: Progress | None = None) -> Plan:
    """Return the fastest plan that fits.

    Raises `NoPlanError` where none fits into memory, with the one that comes nearest, and `ConfigError` for
    levers that contradict each other or that leave nothing to choose.
    """
    bounded = sorted(_bounded(request), key=lambda each: each.bound_seconds)
    if not bounded:
        raise ConfigError(
            f"nothing can be chosen: {request.batch_rows} rows, {request.cluster.num_ranks} devices and the "
            "levers that were given admit no microbatches of a whole number of rows; give fewer levers"
        )
    found: list[Priced] = []
    nearest: tuple[float, Choice, DoesNotFitError] | None = None
    refusal: EvenflowError | None = None
    for number, each in enumerate(bounded):
        best = min((priced.step_seconds for priced in found), default=math.inf)
        if progress is not None:
            progress(number, len(bounded), best)
        if each.bound_seconds >= best:
            break
        try:
            found.append(price(request, each.choice, each.chain))
        except DoesNotFitError as error:
            share = error.needed_bytes / error.kind.cap_bytes
            if nearest is None or share < nearest[0]:
                nearest = share, each.choice, error
        except EvenflowError as error:  # sizes that this schedule can't serve, too few places to cut
            refusal = refusal or error
    if not found:
        if nearest is not None:
            raise NoPlanError(*nearest[1:])
        assert refusal is not None, "each choice was priced or refused"
        raise refusal
    return _plan(request, sorted(found, key=lambda priced: priced.step_seconds), bounded[0].bound_seconds)


@dataclass(frozen=True, slots=True)
class _Bounded:
    choice: Choice
    chain: Chain
    bound_seconds: float


def _bounded(request: Request) -> Iterator[_Bounded]:
    chains: dict[tuple[Degrees, int], tuple[Chain, float]] = {}
    for choice in choices(request):
        key = choice.degrees, choice.microbatch_size
        if key not in chains:
            chain = chain_for(request, choice)
            chains[key] = chain, lower_bound(request, choice, chain)
        yield _Bounded(choice, *chains[key])


def choices(request: Request) -> Iterator[Choice]:
    """Every choice that the levers leave open.

    >>> from evenflow.cluster.short import parse_cluster
    >>> request = Request(lambda rows: None, (1, 2), parse_cluster("2xH100"), 4, 8.0, 0.01)
    >>> sorted({(choice.degrees.pipeline, choice.degrees.data) for choice in choices(request)})
    [(1, 1), (1, 2), (2, 1)]
    """
    levers = request.levers
    for degrees in _degrees(request):
        rows, rest = divmod(request.batch_rows, degrees.data)
        if rest:
            continue
        for size in request.microbatch_sizes:
            number, rest = divmod(rows, size)
            wrong = levers.microbatch_size not in (None, size) or levers.num_microbatches not in (
                None,
                number,
            )
            if rest or wrong or (number > _MOST_MICROBATCHES and levers.num_microbatches is None):
                continue
            for per_rank, schedule in _schedules(request, degrees.pipeline):
                for recompute in (levers.recompute,) if levers.recompute else _RECOMPUTE:
                    yield Choice(degrees, per_rank, schedule, size, number, recompute)


def _degrees(request: Request) -> Iterator[Degrees]:
    levers, num_ranks = request.levers, request.cluster.num_ranks
    # One device alone may be faster than several that are joined badly.
    for used in dict.fromkeys((num_ranks, 1)):
        for pipeline in _divisors(used, levers.pipeline):
            for tensor in _divisors(used // pipeline, levers.tensor, levers.max_tensor):
                for context in _divisors(used // pipeline // tensor, levers.context, levers.max_context):
                    data = used // pipeline // tensor // context
                    if levers.data not in (None, data):
                        continue
                    most = levers.max_expert if request.experts_per_token else 1
                    for expert in _divisors(data, levers.expert, most):
                        for sharding in (levers.sharding,) if levers.sharding else _SHARDINGS:
                            if data > 1 or sharding == "none":
                                yield Degrees(pipeline, data, tensor, context, expert, sharding)


def _divisors(number: int, given: int | None, most: int | None = None) -> tuple[int, ...]:
    if given is not None:
        return (given,) if number % given == 0 else ()
    return tuple(d for d in range(1, min(number, most or number) + 1) if number % d == 0)


def _schedules(request: Request, num_ranks: int) -> Iterator[tuple[int, str]]:
    levers = request.levers
    if num_ranks == 1:
        yield 1, "1f1b"
        return
    for per_rank, names in _SCHEDULES.items():
        if levers.stages_per_rank in (None, per_rank):
            for name in names if levers.schedule is None else (levers.schedule,):
                if name in names or levers.stages_per_rank == per_rank:
                    yield per_rank, name


def describe(choice: Choice) -> str:
    """A choice in a line.

    >>> describe(Choice(Degrees(4, 2), 1, "1f1b", 2, 16, "none"))
    '4 pipeline x 2 data ranks, 1f1b, 16 microbatches of 2'
    """
    degrees = choice.degrees
    kinds = {
        "pipeline": degrees.pipeline,
        "data": degrees.data,
        "tensor": degrees.tensor,
        "context": degrees.context,
    }
    parts = [f"{number} {name}" for name, number in kinds.items() if number > 1 or name == "pipeline"]
    text = f"{' x '.join(parts)} ranks"
    text += f", experts over {degrees.expert}" if degrees.expert > 1 else ""
    text += f" ({degrees.sharding})" if degrees.sharding != "none" else ""
    text += f", {choice.schedule}" if degrees.pipeline > 1 else ""
    text += f" with {choice.stages_per_rank} stages a rank" if choice.stages_per_rank > 1 else ""
    text += f", {choice.num_microbatches} microbatches of {choice.microbatch_size}"
    return text + (f", {choice.recompute} recomputation" if choice.recompute != "none" else "")


def _plan(request: Request, found: list[Priced], bound_seconds: float) -> Plan:
    best = found[0]
    choice, chain = best.choice, request.chain_of(best.choice.microbatch_size)
    labels = node_labels(chain.names)
    recompute = set(best.recompute)
    stages = tuple(
        PlannedStage(
            rank,
            labels[stage.start],
            stage.end - stage.start,
            tuple(labels[node] for node in range(stage.start, stage.end) if node in recompute),
            stage.forward_seconds,
            stage.input_grad_seconds,
            stage.weight_grad_seconds,
            stage.received_bytes,
        )
        for stage, rank in zip(best.stages, best.schedule.placement.rank_of, strict=True)
    )
    ranks = tuple(
        PlannedRank(group.kind, need, group.cap_bytes, idle)
        for group, need, idle in zip(best.groups, best.memory, best.idle, strict=True)
    )
    return Plan(
        choice.degrees,
        choice.schedule,
        choice.stages_per_rank,
        choice.microbatch_size,
        choice.num_microbatches,
        request.max_leaf_share,
        stages,
        ranks,
        _prediction(request, best, chain, bound_seconds),
        tuple(_runner_up(priced) for priced in found[1 : 1 + _NUM_RUNNERS_UP]),
    )


def _prediction(request: Request, best: Priced, chain: Chain, bound_seconds: float) -> Prediction:
    used = request.cluster.devices[: best.choice.degrees.num_devices]
    peaks = [device.flops_per_second.get(request.dtype) for device in used]
    # The backward computes twice what the forward does.
    work = 3 * sum(chain.flops) * request.batch_rows / chain.num_rows
    peak = sum(each for each in peaks if each is not None)
    return Prediction(
        best.step_seconds,
        best.pipeline_seconds,
        best.reduce_seconds,
        best.update_seconds,
        bound_seconds,
        request.batch_rows * request.row_tokens / best.step_seconds,
        work / best.step_seconds / peak if None not in peaks and work else None,
    )


def _runner_up(priced: Priced) -> RunnerUp:
    choice = priced.choice
    return RunnerUp(
        choice.degrees,
        choice.stages_per_rank,
        choice.schedule,
        choice.microbatch_size,
        choice.recompute,
        priced.step_seconds,
    )
