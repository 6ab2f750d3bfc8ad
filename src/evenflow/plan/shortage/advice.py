"""Where nothing fits: what is short, in numbers, and the nearest changes that would fit, each of them priced.

What the request leaves open (recomputation, sharding, sizes of microbatches, degrees) was tried before: a
change is something else. It takes back what was given, adds devices, or trains in another way.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from evenflow.cluster.cluster import Cluster
from evenflow.cluster.sizes import told_bytes
from evenflow.errors import ConfigError, EvenflowError
from evenflow.plan.adapters import LORA_RANK, with_adapters
from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice, Recompute, Sharding, describe
from evenflow.plan.costs.stages import stage_costs
from evenflow.plan.parallel import Peers, tensor_parallel
from evenflow.plan.planner import NoPlanError
from evenflow.plan.rank_memory import RankMemory, TrainingState
from evenflow.plan.recompute import all_worthwhile, recomputed
from evenflow.plan.request import Levers, Request
from evenflow.plan.search.choices import choices, open_shardings
from evenflow.plan.search.price import Priced, chain_for, price

_THRIFTY = frozenset({"1f1b", "v-min"})  # of the schedules, those that hold least
_MOST_CHOICES = 12  # that are priced before a change is given up
_MOST_TIMES = 64  # as many devices, or as much memory, as there is: what needs more is no advice
_MOST_TRIES = 16  # of numbers of devices between too few and enough
_PRECISION = 1.02  # of the least memory that would do
_LEVERS = {
    "recompute": "recomputation left open",
    "microbatch_size": "the size of a microbatch left open",
    "num_microbatches": "the number of microbatches left open",
    "sharding": "sharding left open",
    "tensor": "tensor parallelism left open",
    "data": "data parallelism left open",
    "stages_per_rank": "stages a rank left open",
    "schedule": "the schedule left open",
}


@dataclass(frozen=True, slots=True)
class Short:
    """The rank that is shortest of memory in a choice, with as little memory as would do for that choice."""

    choice: Choice
    rank: int
    kind: str
    memory: RankMemory
    cap_bytes: float


@dataclass(frozen=True, slots=True)
class Change:
    """Something to change, the request that it makes, and a choice of that which was priced and fits."""

    what: str
    request: Request
    priced: Priced

    @property
    def told(self) -> str:
        """The change in a line, with the fullest rank of its choice."""
        full = max(need.allocated for need in self.priced.fit.memory)
        return f"{self.what}: {describe(self.priced.choice)}, at most {told_bytes(full)} on a device"


class NothingFitsError(ConfigError):
    """No plan fits: what is `short`, and the `changes` that would fit."""

    def __init__(self, short: Short, large: str | None, changes: Sequence[Change]) -> None:
        parts = [
            f"{each.name} {told_bytes(getattr(short.memory, each.name))}"
            for each in fields(short.memory)
            if getattr(short.memory, each.name)
        ]
        needs = f"  rank {short.rank} ({short.kind}) needs {told_bytes(short.memory.allocated)}"
        lines = [
            f"no plan fits into memory; the nearest: {describe(short.choice)}",
            f"{needs} and has {told_bytes(short.cap_bytes)}: {' + '.join(parts)}",
            *([f"  {large}"] if large else []),
        ]
        if changes:
            lines.append("What would fit; one choice of each was priced, and may not be its fastest:")
        else:
            lines.append("No single change was found that would fit")
        super().__init__("\n".join([*lines, *(f"- {each.told}" for each in changes)]))
        self.short = short
        self.changes = tuple(changes)


def advised(request: Request, refused: NoPlanError) -> NothingFitsError:
    """Say of a request that the planner refused what is short and what would fit."""
    short, more_memory = _short(request, refused)
    found = [each for each in _changes(request) if each is not None]
    return NothingFitsError(short, too_large(request), [*found, *more_memory])


def _short(request: Request, refused: NoPlanError) -> tuple[Short, list[Change]]:
    """What would do with least memory, what that lacks, and how much memory it takes."""
    chain = chain_for(request, refused.nearest)

    def with_room(times: float) -> Change | None:
        roomier = replace(request, cluster=_roomier(request.cluster, times))
        priced = fitting(roomier) or _priced(roomier, refused.nearest, chain)
        return None if priced is None else Change("", roomier, priced)

    low, high = 1.0, max(refused.needed_bytes / refused.cap_bytes, _PRECISION)
    while (enough := with_room(high)) is None:
        low, high = high, 2 * high
        assert high < math.inf, "what lacks memory fits with more"
    while high > low * _PRECISION:
        middle = math.sqrt(low * high)
        if (found := with_room(middle)) is None:
            low = middle
        else:
            high, enough = middle, found
    fit, rooms = enough.priced.fit, enough.priced.fit.groups
    rank = max(range(len(rooms)), key=lambda at: fit.memory[at].allocated / rooms[at].cap_bytes)
    short = Short(
        enough.priced.choice, rank, rooms[rank].kind, fit.memory[rank], rooms[rank].cap_bytes / high
    )
    room = told_bytes(max(group.cap_bytes for group in rooms))
    return short, [replace(enough, what=f"devices with {room} of room")] if high < _MOST_TIMES else []


def _roomier(cluster: Cluster, times: float) -> Cluster:
    """The cluster where each device has so many times the room, beside what it reserves."""
    return cluster.with_devices(
        lambda each: replace(each, memory_bytes=each.reserved_bytes + times * each.room_bytes)
    )


def _priced(request: Request, choice: Choice, chain: Chain) -> Priced | None:
    try:
        return price(request, choice, chain)
    except EvenflowError:
        return None


def _changes(request: Request) -> Iterator[Change | None]:
    yield from _levers_left_open(request)
    yield _more_devices(request)
    stateless = replace(request.state, optimizer_bytes=0.0, update_bytes=0.0)
    yield _change("SGD without momentum", replace(request, state=stateless))
    yield _change(f"LoRA of rank {LORA_RANK} on all matrices (an estimate)", _adapted(request))


def _levers_left_open(request: Request) -> list[Change]:
    """Each lever that was given left open, where that suffices; else all of them."""
    found = []
    for lever, what in _LEVERS.items():
        if getattr(request.levers, lever) is not None:
            left_open: dict[str, Any] = {lever: None}  # levers differ in their types
            found.append(_change(what, replace(request, levers=replace(request.levers, **left_open))))
    alone = [each for each in found if each is not None]
    together = None if alone else _change("all levers left open", replace(request, levers=Levers()))
    return alone if together is None else [together]


def _change(what: str, request: Request) -> Change | None:
    priced = fitting(request)
    return None if priced is None else Change(what, request, priced)


def fitting(request: Request) -> Priced | None:
    """A choice that fits, of those that need least memory; None where none of them does."""
    sizes = [choice.microbatch_size for choice in choices(request)]
    thrifty = [
        choice
        for choice in choices(request)
        if choice.microbatch_size == min(sizes)
        and (choice.schedule in _THRIFTY or choice.schedule == request.levers.schedule)
    ]
    # Parameters are parted by pipelines and tensors; data ranks hold all that their stages need.
    thrifty.sort(key=lambda choice: (choice.degrees.data, choice.stages_per_rank, choice.degrees.tensor))
    for choice in thrifty[:_MOST_CHOICES]:
        chain = chain_for(request, choice)
        for sharding, recompute in _savings(request, choice):
            degrees = replace(choice.degrees, sharding=sharding)
            saving = replace(choice, degrees=degrees, recompute=recompute)
            if request.allows(saving) and (found := _priced(request, saving, chain)):
                return found
    return None


def _savings(request: Request, choice: Choice) -> Iterator[tuple[Sharding, Recompute]]:
    levers = request.levers
    hows: tuple[Recompute, ...] = ("none", "full", "selective")
    for recompute in hows if levers.recompute is None else (levers.recompute,):
        for sharding in reversed(open_shardings(request, choice)):  # what holds least first
            yield sharding, recompute


def _more_devices(request: Request) -> Change | None:
    """The fewest more devices, or hosts where there are several, like the last one."""
    levers = replace(request.levers, pipeline=None)

    def with_more(number: int) -> Change | None:
        cluster, what = _grown(request.cluster, number)
        return _change(what, replace(request, cluster=cluster, levers=levers))

    # Twice as many again and again: what parts evenly over tensor ranks is among those. Then fewer.
    unit = len(request.cluster.hosts) if len(request.cluster.hosts) > 1 else request.cluster.num_ranks
    low, times = 0, 2
    while (enough := with_more(unit * (times - 1))) is None:
        low, times = unit * (times - 1), 2 * times
        if times > _MOST_TIMES:
            return None
    high = unit * (times - 1)
    fewer = map(with_more, range(low + 1, high, max(1, (high - low) // _MOST_TRIES)))
    return next((found for found in fewer if found), enough)


def _grown(cluster: Cluster, number: int) -> tuple[Cluster, str]:
    *others, last = cluster.hosts
    if others:
        grown = replace(cluster, hosts=(*cluster.hosts, *[last] * number))
        what = f"{number} more host{'s' if number > 1 else ''} of {len(last.devices)}"
    else:
        device = last.devices[-1]
        grown = replace(cluster, hosts=(replace(last, devices=(*last.devices, *[device] * number)),))
        what = f"{number} more {device.name}"
    return grown, f"{what}, {grown.num_ranks} devices in all"


def _adapted(request: Request) -> Request:
    """The request with all parameters frozen and an adapter, in float32, beside each matrix."""
    chain_of = request.chain_of
    return replace(
        request, chain_of=lambda rows: with_adapters(chain_of(rows), LORA_RANK), state=TrainingState()
    )


def too_large(request: Request) -> str | None:
    """Tell of a node that needs more than any device has, and of the tensor degree that makes it fit.

    A cut can't help it; of several, the largest is told of. None where each fits a device.
    """
    size = min(request.microbatch_sizes)
    chain = request.chain_of(size)
    room = max(device.room_bytes for device in request.cluster.devices)
    needs = _needs_alone(chain, request.state)
    most = max(needs)
    if most <= room:
        return None
    node = needs.index(most)
    told = (
        f"{chain.names[node]} alone needs {told_bytes(most)} for a microbatch of {size}, and no device has "
        f"more than {told_bytes(room)}"
    )
    link = request.cluster.hosts[0].link
    for degree in range(2, _MOST_TIMES + 1):
        need = _needs_alone(tensor_parallel(chain, Peers(degree, link)), request.state)[node]
        if need <= room:
            return f"{told}: no cut can help; tensor parallelism over {degree} makes it {told_bytes(need)}"
    return f"{told}: no cut can help, nor tensor parallelism over {_MOST_TIMES}"


def _needs_alone(chain: Chain, state: TrainingState) -> list[float]:
    """What each node needs if it is a stage alone and recomputes, with one microbatch in flight."""
    again = recomputed(chain, all_worthwhile(chain))
    kind = next(iter(chain.seconds))
    stages = stage_costs(again, range(1, chain.num_nodes), [kind] * chain.num_nodes)
    return [
        stage.parameter_bytes
        + stage.trained_bytes * state.gradient_bytes
        + stage.owned_elements * state.optimizer_bytes
        + max(
            stage.saved_bytes + max(stage.forward_transient_bytes, stage.backward_transient_bytes),
            stage.owned_elements * state.update_bytes,
        )
        for stage in stages
    ]
