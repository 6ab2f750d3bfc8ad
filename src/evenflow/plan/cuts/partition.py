"""Partitioning: cut a chain of nodes into stages so that the most loaded rank does as little as possible.

Linear and V placements are solved exactly; looped ones too if they are small, otherwise by a heuristic that
says how far it may be from the best.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from evenflow.errors import ConfigError
from evenflow.ir.costs import ROUNDING
from evenflow.ir.placement import Placement
from evenflow.plan.cuts.linear import Line, Taken, arcs_of, guesses_from
from evenflow.plan.cuts.looped import loops
from evenflow.plan.cuts.problem import DoesNotFitError, Kind, Partition, PartitionProblem
from evenflow.plan.cuts.runs import Runs


def balanced_cuts(
    costs: Sequence[float],
    *,
    cut_bytes: Sequence[float],
    legal: Sequence[bool],
    num_stages: int,
    cost_per_byte: float = 0.0,
) -> tuple[int, ...]:
    """Return where to cut into stages of equal devices without caps, one stage a rank.

    `costs` holds one number per node (any unit), `cut_bytes[c]` and `legal[c]` tell of a cut before node c
    (entries 0 are not used); a byte that crosses a cut costs both stages `cost_per_byte`. Raises
    `ConfigError` when there are fewer places to cut than cuts.

    >>> balanced_cuts([1, 1, 1, 3], cut_bytes=[0, 1, 1, 1], legal=[True] * 4, num_stages=2)
    (3,)
    """
    kind = Kind("a device", tuple(map(float, costs)))
    problem = PartitionProblem(
        Placement.linear(num_stages),
        (kind,) * num_stages,
        tuple(legal),
        tuple(map(float, cut_bytes)),
        cut_seconds=tuple(cost_per_byte * size for size in cut_bytes),
    )
    return partition(problem).positions


def partition(problem: PartitionProblem) -> Partition:
    """Return the best partition; see `problem.py` for what is best.

    Raises `DoesNotFitError` where memory does not suffice, and `ConfigError` for a placement that is neither
    linear nor looped nor V.

    >>> fast, slow = Kind("fast", (1.0,) * 6), Kind("slow", (2.0,) * 6)
    >>> problem = PartitionProblem(
    ...     Placement.linear(2), (fast, slow), (True,) * 6, (0.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    ... )
    >>> partition(problem).positions
    (4,)
    """
    runs = Runs.of(problem)
    placement = problem.placement
    num_ranks = placement.num_ranks
    if placement == Placement.linear(num_ranks):
        return _linear(runs)
    if placement == Placement.v_shape(num_ranks):
        return _v_shape(runs)
    if placement == Placement.looped(num_ranks, placement.num_stages // num_ranks):
        return _looped(runs)
    raise ConfigError(
        f"stages on the ranks {placement.rank_of} are placed neither linear nor looped nor as a V: use one "
        "of these placements"
    )


def _linear(runs: Runs) -> Partition:
    arcs = arcs_of(runs.kind_of, any_order=runs.problem.any_order)
    line = Line(runs, runs.memory_if_scarce(), arcs, 0, runs.num_steps)

    def told(taken: Sequence[Taken]) -> Partition:
        return _measured(runs, [step.last for step in taken[:-1]], [step.arc.kind for step in taken])

    guesses = zip(guesses_from(runs.mean_seconds()), guesses_from(runs.bound_seconds()), strict=True)
    taken = line.cheapest(guesses)
    if taken is None:
        raise _lacking(runs, told(line.roomiest(guesses_from(runs.bound_ratio()))), is_proven=True)
    return _proven(told(taken))


def _v_shape(runs: Runs) -> Partition:
    from evenflow.plan.cuts.v_shape import Bent, Half  # numba takes a while to import

    arcs = arcs_of(runs.kind_of, any_order=runs.problem.any_order)
    bent = Bent(runs, runs.memory_if_scarce(), arcs)

    def told(halves: Sequence[Half]) -> Partition:
        cuts = [*(half.down for half in halves), *(half.up for half in reversed(halves[:-1]))]
        return _measured(runs, cuts, [half.arc.kind for half in halves])

    halves = bent.cheapest(guesses_from(runs.bound_seconds()))
    if halves is None:
        raise _lacking(runs, told(bent.roomiest(guesses_from(runs.bound_ratio()))), is_proven=True)
    return _proven(told(halves))


def _looped(runs: Runs) -> Partition:
    tried = loops(runs)
    found = [_measured(runs, cuts, order) for cuts, order in tried.found]
    fitting = [candidate for candidate in found if _worst(runs, candidate)[0] <= 1 + ROUNDING]
    if not fitting:
        nearest = min(found, key=lambda candidate: _worst(runs, candidate)[0])
        raise _lacking(runs, nearest, is_proven=tried.is_exact)
    best = _lightest(fitting)
    return _proven(best) if tried.is_exact else best


def _lightest(found: Sequence[Partition]) -> Partition:
    """The best of some; loads that differ by rounding alone are the same."""

    def measures(partition: Partition) -> tuple[float, ...]:
        return (*sorted(partition.load_seconds, reverse=True)[:2], partition.sent_bytes)

    left = list(found)
    for place in range(len(measures(left[0]))):
        least = min(measures(partition)[place] for partition in left)
        left = [partition for partition in left if measures(partition)[place] <= least * (1 + ROUNDING)]
    return left[0]


def _proven(partition: Partition) -> Partition:
    return replace(partition, bound_seconds=max(partition.load_seconds))


def _measured(runs: Runs, cuts: Sequence[int], kind_at: Sequence[int]) -> Partition:
    """Return the partition that cuts at these spots, with these kinds at the ranks."""
    problem = runs.problem
    free = [[device for device, kind in enumerate(runs.kind_of) if kind == k] for k in range(len(runs.kinds))]
    devices = tuple(free[kind].pop(0) for kind in kind_at)
    rank_of = problem.placement.rank_of
    loads = [0.0] * problem.placement.num_ranks
    for stage, (first, last) in enumerate(pairwise((0, *cuts, runs.num_steps))):
        elapsed = runs.elapsed[kind_at[rank_of[stage]]]
        loads[rank_of[stage]] += float(elapsed[last] - elapsed[first])
    sent_bytes = 0.0
    for cut, (rank, later) in zip(cuts, pairwise(rank_of), strict=True):
        if rank != later:
            loads[rank] += float(runs.price[cut])
            loads[later] += float(runs.price[cut])
            sent_bytes += float(runs.num_bytes[cut])
    positions = tuple(int(runs.spots[cut]) for cut in cuts)
    return Partition(
        positions,
        devices,
        tuple(loads),
        _needed(problem, positions),
        sent_bytes=sent_bytes,
        bound_seconds=runs.bound_seconds(),
    )


def _needed(problem: PartitionProblem, positions: Sequence[int]) -> tuple[float, ...]:
    num_stages, rank_of = problem.placement.num_stages, problem.placement.rank_of
    num_bytes, transient = [0.0] * num_stages, [0.0] * problem.placement.num_ranks
    for groups, times in ((problem.static, (1.0,) * num_stages), (problem.held, problem.in_flight)):
        for group in groups:
            for stage in {bisect_right(positions, node) for node in group.nodes}:
                num_bytes[stage] += times[stage] * group.num_bytes
    for node, num in enumerate(problem.transient_bytes):
        rank = rank_of[bisect_right(positions, node)]
        transient[rank] = max(transient[rank], num)
    needed = transient
    for stage, rank in enumerate(rank_of):
        needed[rank] += num_bytes[stage]
    return tuple(needed)


def _worst(runs: Runs, partition: Partition) -> tuple[float, int]:
    """The largest ratio of need to cap, and its rank."""
    caps = [runs.problem.kinds[device].cap_bytes for device in partition.devices]
    ratios = [need / cap for need, cap in zip(partition.needed_bytes, caps, strict=True)]
    return max(ratios), ratios.index(max(ratios))


def _lacking(runs: Runs, nearest: Partition, *, is_proven: bool) -> DoesNotFitError:
    rank = _worst(runs, nearest)[1]
    kind = runs.problem.kinds[nearest.devices[rank]]
    needed_bytes = nearest.needed_bytes[rank]
    return DoesNotFitError(
        rank, kind.name, needed_bytes=needed_bytes, cap_bytes=kind.cap_bytes, is_proven=is_proven
    )
