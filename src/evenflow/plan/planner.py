"""The planner: price every choice that could be the best, and say how far the best is from what is possible.

The space: over how many devices the pipeline, the data, tensors, experts and contexts go, how many stages a
rank holds and where, which schedule, the size of a microbatch. What is sharded over data ranks and what is
recomputed follows from memory: the first of the ways to save some, in the order of what they cost, that fits.
One pipeline stage with plain or sharded data parallelism is always among the choices, so that the answer may
be not to pipeline.

Choices are priced in the order of an estimate: first the least work, and the idle time that their schedule
has with equal stages; then, for those that are next by that, with what memory and recomputation add
(`expected.py`). What is estimated above the best that was found is not priced. Of the best few the cuts are
then moved as long as that helps (`refine.py`), and an order of its own is searched where methods of the
catalog leave stages idle (`searched.py`). The bound that a plan states is a strict one: of all choices,
priced or not, the least work spread without a loss.
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from evenflow.errors import ConfigError, EvenflowError
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice, Degrees, Recompute, Sharding, describe
from evenflow.plan.cuts.problem import DoesNotFitError, check_places
from evenflow.plan.known_costs import planned_links
from evenflow.plan.layers import layer_labels
from evenflow.plan.plan import Plan, PlannedRank, PlannedStage, Prediction, RunnerUp, node_labels
from evenflow.plan.recompute import all_worthwhile, cheapest_to_hold
from evenflow.plan.request import Request
from evenflow.plan.search.choices import choices, contradiction, open_shardings
from evenflow.plan.search.expected import Expected, expected
from evenflow.plan.search.fit import refuse_at_once
from evenflow.plan.search.price import Priced, chain_for, lower_bound, price
from evenflow.plan.search.refine import refined
from evenflow.plan.search.scheduled import stretch_of
from evenflow.plan.search.searched import searched
from evenflow.schedule_file import format_rows
from evenflow.schedules import catalog

_MARGIN = 1.02  # a rank that does more than expected by less is as good as that
_NUM_RUNNERS_UP = 5

BUDGET_SECONDS = 40.0
SEARCH_SECONDS = 5.0

Progress = Callable[[int, int, float], None]  # choices seen, of all, best seconds so far


class NoPlanError(ConfigError):
    """No choice fits; `nearest` is the one that lacks least, `needed_bytes` on a device of `cap_bytes`."""

    def __init__(self, nearest: Choice, error: DoesNotFitError) -> None:
        super().__init__(f"no plan fits into memory; the nearest: {describe(nearest)}: {error}")
        self.nearest = nearest
        self.needed_bytes = error.needed_bytes
        self.cap_bytes = error.cap_bytes


def plan(
    request: Request,
    *,
    budget_seconds: float = BUDGET_SECONDS,
    search_seconds: float = SEARCH_SECONDS,
    progress: Progress | None = None,
) -> Plan:
    """Return the fastest plan that fits.

    Pricing goes on until all that is left is estimated to be slower, or for about `budget_seconds` if a plan
    was found by then; what is left is what a choice of a higher estimate might gain, and no more than the
    plan's gap. Then a schedule is searched, in steps that take about `search_seconds`; with 0 none is.

    Raises `NoPlanError` where none fits into memory, with the one that comes nearest, and `ConfigError` for
    levers that contradict each other or that leave nothing to choose.

    >>> from evenflow.cluster.short import parse_cluster
    >>> from evenflow.plan.chain import Seconds
    >>> from evenflow.plan.request import Levers
    >>> ones = (1.0,) * 8
    >>> chain = Chain(tuple("abcdefgh"), 1, ones, {"H100": Seconds(ones, ones, ones)})
    >>> levers = Levers(pipeline=2, stages_per_rank=1, schedule="1f1b")
    >>> asked = Request(lambda rows: chain, (1,), parse_cluster("2xH100"), 8, 64.0, 1.0, levers=levers)
    >>> [(stage.first, stage.num_nodes) for stage in plan(asked).stages]
    [('a', 4), ('e', 4)]
    """
    search, start = _Search(request), time.perf_counter()
    for seen in search.run():
        if progress is not None:
            progress(seen, search.num_choices, search.best_seconds)
        if search.found and time.perf_counter() - start > budget_seconds:
            break
    if not search.found:
        search.refuse()
    best = sorted(search.found, key=_step_seconds)[: 1 + _NUM_RUNNERS_UP]
    best = sorted((refined(request, priced) for priced in best), key=_step_seconds)
    if (own := searched(request, best, budget_seconds=search_seconds)) is not None:
        best = [own, *best[:_NUM_RUNNERS_UP]]
    return _plan(request, best, search.bound_seconds)


def _step_seconds(priced: Priced) -> float:
    return priced.step_seconds


@dataclass(frozen=True, slots=True)
class _Open:
    """A choice, and the savings of memory that are left to try with it: sharding, recomputation."""

    choice: Choice
    chain: Chain
    savings: tuple[tuple[Sharding, Recompute], ...]


@dataclass(frozen=True, slots=True)
class _Saving:
    """A choice with one of the savings, what it is likely to take, and what is left to try beside it."""

    choice: Choice
    chain: Chain
    told: Expected
    left: _Open


class _Search:
    """What is to be looked at, by estimate; what was priced so far, and of what did not fit the nearest.

    Raises `ConfigError` where the levers leave no choice.
    """

    def __init__(self, request: Request) -> None:
        self.found: list[Priced] = []
        self.bound_seconds = math.inf
        self._request = request
        self._order = itertools.count()
        self._queue: list[tuple[bool, float, int, _Open | _Saving]] = []  # (does not fit, seconds, ...)
        self._nearest: tuple[float, Choice, DoesNotFitError] | None = None
        self._refusal: EvenflowError | None = None
        chains: dict[tuple[int, int, int, int], Chain] = {}
        bounds: dict[tuple[Degrees, int], float] = {}
        for choice in choices(request):
            degrees, size = choice.degrees, choice.microbatch_size
            key = degrees.tensor, degrees.context, degrees.expert, size
            if key not in chains:
                chains[key] = chain_for(request, choice)
            if (degrees, size) not in bounds:
                bounds[degrees, size] = lower_bound(request, choice, chains[key])
            self.bound_seconds = min(self.bound_seconds, bounds[degrees, size])
            self._begin(choice, chains[key], bounds[degrees, size])
        self.num_choices = len(self._queue)
        if not self._queue and self._refusal is None:
            raise ConfigError(contradiction(request))

    def _begin(self, choice: Choice, chain: Chain, bound_seconds: float) -> None:
        try:
            check_places(chain.legal, choice.degrees.pipeline * choice.stages_per_rank)
            seconds = bound_seconds * stretch_of(choice, chain)
        except ConfigError as error:  # too few places to cut, or a schedule that can't serve these sizes
            self._refusal = self._refusal or error
        else:
            self._push(_Open(choice, chain, tuple(self._savings(choice))), seconds)

    def _push(self, candidate: _Open | _Saving, seconds: float, *, fits: bool = True) -> None:
        heapq.heappush(self._queue, (not fits, seconds, next(self._order), candidate))

    @property
    def best_seconds(self) -> float:
        """The shortest step so far."""
        return min((priced.step_seconds for priced in self.found), default=math.inf)

    def run(self) -> Iterator[int]:
        """Look at what may be best, until all that is left is no better; tell how many choices were seen."""
        seen = 0
        while self._queue:
            lacks, seconds, _, candidate = heapq.heappop(self._queue)
            if self.found and (lacks or seconds >= self.best_seconds):
                return
            match candidate:
                case _Open():
                    self._save(candidate)
                    seen += 1
                case _Saving():
                    self._price(candidate)
            yield seen

    def _save(self, candidate: _Open) -> None:
        """Put a choice back with each of the savings that may fit, up to the first that has room."""
        for number, (sharding, recompute) in enumerate(candidate.savings, 1):
            degrees = replace(candidate.choice.degrees, sharding=sharding)
            choice = replace(candidate.choice, degrees=degrees, recompute=recompute)
            if not self._request.allows(choice):
                continue
            chain = chain_for(self._request, choice) if degrees.gathers_nodes else candidate.chain
            all_again = cheapest_to_hold(chain, all_worthwhile(chain))
            try:
                refuse_at_once(self._request, choice, chain if recompute == "none" else all_again)
                told = expected(self._request, choice, chain)
            except DoesNotFitError as error:
                self._note(choice, error)
            except EvenflowError as error:  # sizes that this schedule can't serve
                self._refusal = self._refusal or error
                return
            else:
                left = replace(candidate, savings=candidate.savings[number:] if told.is_roomy else ())
                self._push(_Saving(choice, chain, told, left), told.seconds, fits=told.fits)
                # To gather node by node hides the sums of gradients, with or without room.
                if told.is_roomy and (degrees.pipeline > 1 or sharding == "fsdp"):
                    return

    def _price(self, candidate: _Saving) -> None:
        choice = candidate.choice
        try:
            priced = price(self._request, choice, candidate.chain)
        except DoesNotFitError as error:
            self._note(choice, error)
        except EvenflowError as error:
            self._refusal = self._refusal or error
            return
        else:
            is_same = choice.recompute == "selective" and not priced.fit.again  # as "none"
            if not is_same or self._request.levers.recompute is not None:
                self.found.append(priced)
            if max(priced.fit.load_seconds) <= candidate.told.load_seconds * _MARGIN:
                return
        # Memory has a say in the cut after all: the next saving may give back more than it costs.
        self._save(candidate.left)

    def _note(self, choice: Choice, error: DoesNotFitError) -> None:
        share = error.needed_bytes / error.cap_bytes
        if self._nearest is None or share < self._nearest[0]:
            self._nearest = share, choice, error

    def _savings(self, choice: Choice) -> Iterator[tuple[Sharding, Recompute]]:
        levers = self._request.levers
        # "selective" may recompute everything: "full" is for those who can't choose.
        chooses = self._request.allows(replace(choice, recompute="selective"))
        open_ones: tuple[Recompute, ...] = ("none", "selective" if chooses else "full")
        hows = open_ones if levers.recompute is None else (levers.recompute,)
        for recompute in hows:
            for sharding in open_shardings(self._request, choice):
                yield sharding, recompute

    def refuse(self) -> NoReturn:
        """Say why there is no plan."""
        if self._nearest is not None:
            raise NoPlanError(*self._nearest[1:])
        if self._refusal is None:
            raise ConfigError(
                f"sharding = {self._request.levers.sharding!r} shares over data ranks, and no choice has "
                "any: leave it out, or plan for more devices"
            )
        raise self._refusal


def _plan(request: Request, found: list[Priced], bound_seconds: float) -> Plan:
    best, fit = found[0], found[0].fit
    choice, chain = best.choice, request.chain_of(best.choice.microbatch_size)
    labels = node_labels(chain.names)
    again = set(fit.again)
    stages = tuple(
        PlannedStage(
            rank,
            labels[stage.start],
            stage.end - stage.start,
            tuple(labels[node] for node in range(stage.start, stage.end) if node in again),
            stage.forward_seconds,
            stage.input_grad_seconds,
            stage.weight_grad_seconds,
            stage.received_bytes,
        )
        for stage, rank in zip(fit.stages, fit.schedule.placement.rank_of, strict=True)
    )
    ranks = tuple(
        PlannedRank(group.kind, group.first, need, group.cap_bytes, idle)
        for group, need, idle in zip(fit.groups, fit.memory, best.idle, strict=True)
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
        planned_links(fit.costs.links),
        tuple(_runner_up(priced) for priced in found[1:]),
        tuple(format_rows(fit.schedule)) if choice.schedule == catalog.AUTO else (),
        layer_labels(chain.names),
        choice.recompute if again else "none",
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
