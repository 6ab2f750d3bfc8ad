"""What would lower a rank's peak of memory, in a run that ran out of it: changes, each priced by its plan."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from evenflow.cluster.cluster import Cluster
from evenflow.errors import EvenflowError
from evenflow.plan.choice import Choice
from evenflow.plan.recompute import all_worthwhile, recomputed
from evenflow.plan.request import Request
from evenflow.plan.scale import in_proportion
from evenflow.plan.search.fit import Fit, at_cuts, fitted
from evenflow.plan.search.scheduled import schedule_of
from evenflow.schedules import catalog
from evenflow.simulate import simulate

_LEAST_SAVING = 0.02  # of the peak; what saves less is no remedy
_CAPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the peak, that other cuts are looked for under


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, the most that any rank would then hold (bytes), and the seconds of a step."""

    what: str
    peak_bytes: float
    step_seconds: float


def step_seconds(fit: Fit, *, alone: bool = False) -> float:
    """What the pipeline of a cut takes for a step; `alone`: in one process, where ranks take turns."""
    if alone:
        schedule = fit.schedule
        return sum(fit.costs.work_seconds(schedule.placement, schedule.num_microbatches, trains=True))
    return simulate(fit.schedule, fit.flow, fit.costs).makespan_seconds


def peak_bytes(fit: Fit, *, alone: bool = False) -> float:
    """What the fullest rank of a cut holds at its peak; all ranks, where they are `alone` in one memory."""
    needs = [memory.allocated for memory in fit.memory]
    return sum(needs) if alone else max(needs)


def remedies(
    request: Request,
    choice: Choice,
    now: Fit,
    room_bytes: float,
    *,
    alone: bool = False,
    offloads: bool = False,
) -> list[Remedy]:
    """The cheapest changes that lower the peak, of each kind one; those that fit into `room_bytes` first.

    `now` is what runs: the choice's schedule, or one of the user's own, at its cuts; `alone` says that one
    process has all ranks, in one memory; `offloads`, that devices have a host whose memory is another, to
    which nothing is offloaded yet.
    """

    def cost(remedy: Remedy) -> tuple[bool, float]:
        fits = remedy.peak_bytes <= room_bytes
        return not fits, remedy.step_seconds if fits else remedy.peak_bytes

    most = (1 - _LEAST_SAVING) * peak_bytes(now, alone=alone)
    found = []
    # What moves work to other ranks moves nothing where they share their memory.
    moving = () if alone else (_other_cuts, _one_more_rank)
    away = (_offload,) if offloads else ()
    for changes in (_smaller_microbatches, _other_schedules, _again, *away, *moving):
        of_kind = []
        with contextlib.suppress(EvenflowError):  # no more such changes can be made
            for what, fit in changes(request, choice, now):
                peak = peak_bytes(fit, alone=alone)
                if peak <= most:
                    of_kind.append(Remedy(what, peak, step_seconds(fit, alone=alone)))
        found += sorted(of_kind, key=cost)[:1]
    return sorted(found, key=cost)


def _smaller_microbatches(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    size = choice.microbatch_size
    while choice.schedule in catalog.SCHEDULES and size % 2 == 0:
        size //= 2
        smaller = replace(
            choice,
            microbatch_size=size,
            num_microbatches=choice.num_microbatches * choice.microbatch_size // size,
        )
        fit = at_cuts(request, smaller, in_proportion(now.chain, size), now.positions, now.groups)
        yield f"microbatch_size={size}", fit


def _other_schedules(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    for name in catalog.SCHEDULES:
        other = replace(choice, schedule=name)
        try:
            schedule = schedule_of(other)
        except EvenflowError:  # not for these sizes
            continue
        if schedule.trains and schedule.placement == now.schedule.placement:
            yield f'schedule="{name}"', at_cuts(request, other, now.chain, now.positions, now.groups)


def _other_cuts(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    """The same schedule at the cuts that hold least, or nearly."""
    reserved = request.cluster.devices[0].reserved_bytes
    best: Fit | None = None
    for share in _CAPS if choice.schedule in catalog.SCHEDULES else ():
        try:
            best = fitted(request.with_memory(share * peak_bytes(now) + reserved), choice, now.chain)
        except EvenflowError:
            break
    if best is not None:
        labels = ", ".join(f'"{now.chain.names[at]}"' for at in best.positions)
        yield f"other cuts, before {labels}", best


def _again(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    again = recomputed(now.chain, all_worthwhile(now.chain))
    fit = at_cuts(request, choice, again, now.positions, now.groups, schedule=now.schedule)
    yield 'recompute="full"', fit


def _offload(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    fit = at_cuts(request, choice, now.chain, now.positions, now.groups, schedule=now.schedule, offloads=True)
    yield 'offload="activations"', fit


def _one_more_rank(request: Request, choice: Choice, now: Fit) -> Iterator[tuple[str, Fit]]:
    (host,) = request.cluster.hosts
    grown = Cluster((replace(host, devices=(*host.devices, host.devices[-1])),))
    degrees = replace(choice.degrees, pipeline=choice.degrees.pipeline + 1)
    more = replace(choice, degrees=degrees)
    enough = 2 * peak_bytes(now) + host.devices[0].reserved_bytes
    wide = replace(request, cluster=grown).with_memory(enough)
    if choice.schedule in catalog.SCHEDULES:
        yield f"{degrees.pipeline} ranks instead of {choice.degrees.pipeline}", fitted(wide, more, now.chain)
