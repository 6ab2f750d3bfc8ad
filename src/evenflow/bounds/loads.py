"""Loads: how much work the memory of a rank can hold, and how long it takes to fill and to empty.

What is held while it waits for its work is a knapsack: things of some memory and some seconds, and a limit.
Fractions of things are allowed, which can only make the load larger, and the search for it a sort.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

from evenflow.bounds.instance import Instance
from evenflow.ir.costs import ROUNDING


def room_of(instance: Instance, rank: int) -> float:
    """Return the most memory that can be held within a rank's cap; infinite without one.

    If all sizes are multiples of the smallest, so is what is held, and the room is the cap rounded down.

    >>> from evenflow.bounds import instance_of
    >>> from evenflow.ir import Costs, Placement
    >>> costs = Costs.of_ranks(Placement.v_shape(2), *[(1.0, 1.0)] * 3, memory_caps=(2.75, 2.75))
    >>> room_of(instance_of(Placement.v_shape(2), 8, costs), 0)
    2.5
    """
    cap = instance.caps[rank]
    stages = instance.placement.stages_on(rank)
    sizes = [memory[stage] for memory in (instance.held_memory, instance.kept_memory) for stage in stages]
    sizes = [size for size in sizes if size]
    if cap == math.inf or not sizes:
        return math.inf
    unit = min(sizes)
    if all(math.isclose(size / unit, round(size / unit), rel_tol=ROUNDING) for size in sizes):
        return math.floor(cap / unit * (1 + ROUNDING)) * unit
    return cap


def envelope(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the steps (memory, seconds) of the least concave curve from 0 over all points, steepest first.

    A thing that can be in one of several states loads no more than the same steps taken one by one.

    >>> envelope([(1.0, 3.0), (2.0, 4.0), (3.0, 7.0)])
    [(1.0, 3.0), (2.0, 4.0)]
    """
    corners = [(0.0, 0.0)]
    for memory, seconds in sorted(points):
        if seconds <= corners[-1][1]:
            continue
        corner = (memory, seconds)
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], corner):
            corners.pop()
        corners.append(corner)
    return [(right[0] - left[0], right[1] - left[1]) for left, right in itertools.pairwise(corners)]


def most_seconds(things: Iterable[tuple[float, float, int]], room: float) -> float:
    """Return the most seconds of things (memory, seconds, how many) that fit into `room`, or of fractions.

    >>> most_seconds([(1.0, 3.0, 2), (2.0, 2.0, 5), (0.0, 1.0, 4)], room=3.0)
    11.0
    """
    total, room = 0.0, max(room, 0.0)
    for memory, seconds, count in sorted(things, key=lambda thing: -_slope((0.0, 0.0), thing[:2])):
        fitting = min(count, room / memory) if memory else count
        total += fitting * seconds
        room -= fitting * memory
    return total


def ramp(ops: Sequence[tuple[float, float]], room: float) -> tuple[float, float]:
    """Return the seconds to fill `room` with ops of (memory, seconds), and the memory-seconds lost meanwhile.

    Ops run one by one and each takes its memory at once, so t seconds after the first start no more is held
    than the largest op's memory and t times the best rate. Turned round, so a memory is emptied.

    >>> ramp([(1.0, 0.5)], room=3.0)
    (1.0, 1.0)
    """
    rate = max(memory / seconds if seconds else math.inf for memory, seconds in ops if memory)
    missing = room - max(memory for memory, _ in ops)
    if rate == math.inf or missing <= 0:
        return 0.0, 0.0
    return missing / rate, missing**2 / (2 * rate)


def _slope(left: tuple[float, float], right: tuple[float, ...]) -> float:
    memory = right[0] - left[0]
    return (right[1] - left[1]) / memory if memory else math.inf
