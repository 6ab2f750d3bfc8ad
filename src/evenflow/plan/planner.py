"""The planner: price every choice that could be the best, and say how far the best is from what is possible.

The space: over how many devices the pipeline, the data, tensors, experts and contexts go, how many stages a
rank holds and where, which schedule, the size of a microbatch. What is sharded over data ranks and what is
recomputed follows from memory: the first of the ways to save some, in the order of what they cost, that fits.
One pipeline stage with plain or sharded data parallelism is always among the choices, so that the answer may
be not to pipeline.

Choices are priced in the order of an estimate: all work spread without a loss, and the idle time that their
schedule has with equal stages. What is estimated above the best that was found is not priced. The bound that
a plan states is a strict one: of all choices, priced or not, the least work spread without a loss.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from evenflow.errors import ConfigError, EvenflowError
from evenflow.plan.chain import Chain
from evenflow.plan.contradictions import contradiction
from evenflow.plan.plan import (
    Degrees,
    Plan,
    PlannedRank,
    PlannedStage,
    Prediction,
    RunnerUp,
    node_labels,
)
from evenflow.plan.price import Priced, chain_for, lower_bound, price, stretch_of
from evenflow.plan.problem import DoesNotFitError
from evenflow.plan.rank_memory import Sharding
from evenflow.plan.request import Choice, Request

# By stages per rank: the schedules worth pricing. The others are never faster, nor hold less.
_SCHEDULES = {
    1: ("1f1b", "zb-h1", "zb-h2"),
    2: ("interleaved-1f1b", "interleaved-zb", "zb-v", "v-half", "v-min"),
    4: ("interleaved-1f1b", "interleaved-zb"),
}
# Ways to save memory, in the order of what they cost: (what data ranks share, what is recomputed).
_SAVINGS: tuple[tuple[Sharding, str], ...] = (
    ("none", "none"),
    ("zero1", "none"),
    ("fsdp", "none"),
    ("none", "selective"),
    ("zero1", "selective"),
    ("fsdp", "selective"),
    ("none", "full"),
    ("zero1", "full"),
    ("fsdp", "full"),
)
_MARGIN = 1.02  # a step that is longer than its estimate by less is as good as that
_MOST_MICROBATCHES = 512  # of a choice of the planner's own; the user may ask for more
_NUM_RUNNERS_UP = 5

BUDGET_SECONDS = 40.0

Progress = Callable[[int, int, float], None]  # choices seen, of all, best seconds so far


class NoPlanError(ConfigError):
    """No choice fits; `nearest` is the one that lacks least, `needed_bytes` on a device of `cap_bytes`."""

    def __init__(self, nearest: Choice, error: DoesNotFitError) -> None:
        super().__init__(f"no plan fits into memory; the nearest: {describe(nearest)}: {error}")
        self.nearest = nearest
        self.needed_bytes = error.needed_bytes
        self.cap_bytes = error.kind.cap_bytes


def plan(
    request: Request, *, budget_seconds: float = BUDGET_SECONDS, progress: Progress | None = None
) -> Plan:
    """Return the fastest plan that fits.

    Pricing goes on for at most about `budget_seconds` once something fits; what is left then is what several
    stages a rank, or a choice of a higher estimate, might gain, and no more than the plan's gap.

    Raises `NoPlanError` where none fits into memory, with the one that comes nearest, and `ConfigError` for
    levers that contradict each other or that leave nothing to choose.
    """
    # One stage a rank first: it is cut exactly and at once, and what it reaches rules out most of the rest.
    ranked = sorted(
        _ranked(request), key=lambda each: (each.choice.stages_per_rank > 1, each.estimate_seconds)
    )
    if not ranked:
        raise ConfigError(contradiction(request))
    search, start = _Search(request), time.perf_counter()
    for number, each in enumerate(ranked):
        if progress is not None:
            progress(number, len(ranked), search.best_seconds)
        if search.found and time.perf_counter() - start > budget_seconds:
            break
        if each.estimate_seconds < search.best_seconds:
            search.look_at(each)
    found = sorted(search.found, key=lambda priced: priced.step_seconds)
    return _plan(request, found or search.refuse(), min(each.bound_seconds for each in ranked))


@dataclass(frozen=True, slots=True)
class _Ranked:
    choice: Choice  # without savings
    chain: Chain
    bound_seconds: float
    estimate_seconds: float


def _ranked(request: Request) -> Iterator[_Ranked]:
    chains: dict[tuple[Degrees, int], tuple[Chain, float]] = {}
    for choice in choices(request):
        key = choice.degrees, choice.microbatch_size
        if key not in chains:
            chain = chain_for(request, choice)
            chains[key] = chain, lower_bound(request, choice, chain)
        chain, bound_seconds = chains[key]
        yield _Ranked(choice, chain, bound_seconds, bound_seconds * stretch_of(choice))


class _Search:
    """What was priced so far, and of what did not fit the nearest."""

    def __init__(self, request: Request) -> None:
        self.found: list[Priced] = []
        self._request = request
        self._nearest: tuple[float, Choice, DoesNotFitError] | None = None
        self._refusal: EvenflowError | None = None

    @property
    def best_seconds(self) -> float:
        """The shortest step so far."""
        return min((priced.step_seconds for priced in self.found), default=math.inf)

    def look_at(self, ranked: _Ranked) -> None:
        """Price a choice with the cheapest savings that fit, and with others where they may be faster."""
        for sharding, recompute in self._savings(ranked.choice):
            degrees = replace(ranked.choice.degrees, sharding=sharding)
            choice = replace(ranked.choice, degrees=degrees, recompute=recompute)
            if not self._request.allows(choice):
                continue
            try:
                priced = price(self._request, choice, ranked.chain)
            except DoesNotFitError as error:
                share = error.needed_bytes / error.kind.cap_bytes
                if self._nearest is None or share < self._nearest[0]:
                    self._nearest = share, choice, error
            except EvenflowError as error:  # sizes that this schedule can't serve, too few places to cut
                self._refusal = self._refusal or error
                return
            else:
                if recompute != "selective" or priced.recompute:
                    self.found.append(priced)
                # Where memory bends the cut, the next saving may give back more than it costs.
                if recompute != "none" or priced.pipeline_seconds <= ranked.estimate_seconds * _MARGIN:
                    return

    def _savings(self, choice: Choice) -> Iterator[tuple[Sharding, str]]:
        levers, degrees = self._request.levers, choice.degrees
        for sharding, recompute in _SAVINGS:
            if levers.sharding not in (None, sharding) or levers.recompute not in (None, recompute):
                continue
            if degrees.data == 1 and sharding != "none":
                continue
            # To find the fewest nodes takes many cuts, and those of looped stages take long.
            if recompute != "selective" or choice.stages_per_rank == 1 or levers.recompute is not None:
                yield sharding, recompute

    def refuse(self) -> NoReturn:
        """Say why there is no plan."""
        if self._nearest is not None:
            raise NoPlanError(*self._nearest[1:])
        assert self._refusal is not None, "each choice was priced or refused"
        raise self._refusal


def choices(request: Request) -> Iterator[Choice]:
    """Every choice that the levers leave open, without savings of memory.

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
            wanted = levers.num_microbatches
            if rest or levers.microbatch_size not in (None, size) or wanted not in (None, number):
                continue
            if wanted is None and number > _MOST_MICROBATCHES:
                continue
            for per_rank, schedule in _schedules(request, degrees.pipeline):
                choice = Choice(degrees, per_rank, schedule, size, number, "none")
                if request.lays_out(choice):
                    yield choice


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
                        yield Degrees(pipeline, data, tensor, context, expert)


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
    text = f"{' x '.join(parts)} rank{'s' if degrees.num_devices > 1 else ''}"
    text += f", experts over {degrees.expert}" if degrees.expert > 1 else ""
    text += f" ({degrees.sharding})" if degrees.sharding != "none" else ""
    text += f", {choice.schedule}" if degrees.pipeline > 1 else ""
    text += f" with {choice.stages_per_rank} stages a rank" if choice.stages_per_rank > 1 else ""
    number = choice.num_microbatches
    text += f", {number} microbatch{'es' if number > 1 else ''} of {choice.microbatch_size}"
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
        PlannedRank(group.kind, group.first, need, group.cap_bytes, idle)
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
