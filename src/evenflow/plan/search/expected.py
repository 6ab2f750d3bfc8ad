"""What a choice is likely to take, at once: without a cut, and without a schedule's every op.

The chain is taken for a rod that can be cut anywhere and is the same all along: what a rank has of its
seconds it has of its bytes. Memory then says how much of the rod a rank can hold, and how much of that it
must recompute. The planner prices in the order of it.
"""

from dataclasses import dataclass

import numpy as np

from evenflow.plan.chain import Chain
from evenflow.plan.choice import Choice
from evenflow.plan.cuts.runs import Floats
from evenflow.plan.recompute import all_worthwhile, curve, recomputed, transients
from evenflow.plan.request import Request
from evenflow.plan.search.fit import groups_of, static_bytes
from evenflow.plan.search.price import least_load, mean_sum_seconds
from evenflow.plan.search.scheduled import in_flight, microbatches_in_flight, stretch_of

_ROUNDS = 8
_NEARLY = 0.9  # a rod of which so much finds room may in truth fit


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds of a step, and of a microbatch on the most loaded rank; whether it may fit, and with room."""

    seconds: float
    load_seconds: float
    fits: bool
    is_roomy: bool


def expected(request: Request, choice: Choice, chain: Chain) -> Expected:
    """What a choice is likely to take; `chain` is `chain_for` it.

    Raises `ConfigError` for a schedule that cannot serve the choice's sizes.
    """
    if choice.recompute == "full":
        chain = recomputed(chain, all_worthwhile(chain))
    groups = groups_of(request.cluster, choice.degrees)
    placement = in_flight(choice, request.overheads).placement
    flying = microbatches_in_flight(choice, chain, request.overheads)
    held = np.array([np.mean([flying[s] for s in placement.stages_on(r)]) for r in range(len(groups))])
    totals = {kind: sum(seconds.total) for kind, seconds in chain.seconds.items()}
    alone = np.array([totals[group.kind] for group in groups])
    caps = np.maximum(np.array([group.cap_bytes for group in groups]) - max(transients(chain)), 0.0)
    saved = sum(each.num_bytes for each in chain.saved)
    static = sum(each.num_bytes for each in static_bytes(request, choice.degrees, chain))
    chooses = choice.recompute == "selective"
    freed, again = map(np.array, curve(chain, groups[0].kind) if chooses else ([0.0], [0.0]))
    room = caps / np.maximum(static + held * (saved - freed[-1]), 1.0)
    found = min(float(room.sum()), 1.0)
    seconds, share = alone, np.zeros(len(groups))
    over = np.zeros(len(groups))
    for _ in range(_ROUNDS):
        share = _filled(1 / seconds, room / found)
        over = np.maximum(share * (static + held * saved) - caps, 0.0) / held
        share_of_rod = np.maximum(share, 1e-9)
        extra = np.interp(over / share_of_rod, freed, again) * alone / alone[0]
        seconds = alone + extra
    slower = float((share * seconds).sum() / (share * alone).sum())
    load = max(float((share * seconds).max()), least_load(chain, groups) * slower)
    load += 2 * choice.stages_per_rank * request.overheads.op_seconds
    pipeline = load * choice.num_microbatches * stretch_of(choice, chain)
    return Expected(
        load_seconds=load,
        seconds=pipeline / found
        + mean_sum_seconds(request, choice.degrees, chain)
        + request.overheads.step_seconds,
        fits=found >= _NEARLY,
        is_roomy=found == 1 and bool((share < room).all()) and not over.any(),
    )


def _filled(wish: Floats, room: Floats) -> Floats:
    """Shares of 1 in proportion to a wish, none above its room; the room in sum must do."""
    share, full = np.zeros(len(wish)), np.zeros(len(wish), dtype=bool)
    while True:
        left = 1 - room[full].sum()
        share = np.where(full, room, 0.0)
        if full.all():
            return share
        share[~full] = left * wish[~full] / wish[~full].sum()
        over = ~full & (share > room * (1 + 1e-12))
        if not over.any():
            return share
        full |= over
