"""Partitioning: cut a chain of nodes into stages so that the heaviest stage is as light as possible.

Exact: a parametric search over the bottleneck with a greedy test (Pinar & Aykanat, "Fast optimal load
balancing algorithms for 1D partitioning", 2004). Among cuts within a small tolerance of that optimum, a
sliding-window dynamic programme takes those that send the fewest bytes.
"""

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from evenflow.errors import ConfigError

TOLERANCE = 0.03  # of the best bottleneck, given up where it saves bytes


def partition(
    costs: Sequence[float], *, cut_bytes: Sequence[float], legal: Sequence[bool], num_stages: int
) -> tuple[int, ...]:
    """Positions of the `num_stages - 1` cuts; a cut at `c` stands before node `c`.

    `costs` holds one number per node (any unit), `cut_bytes[c]` and `legal[c]` tell of a cut at `c`
    (entries 0 are not used). Raises `ConfigError` when there are fewer places to cut than cuts.

    >>> partition([1, 1, 1, 3], cut_bytes=[0, 1, 1, 1], legal=[True] * 4, num_stages=2)
    (3,)
    """
    places = [c for c in range(1, len(costs)) if legal[c]]
    if len(places) < num_stages - 1:
        raise ConfigError(
            f"{num_stages} stages need {num_stages - 1} cuts, but the recorded program has {len(costs)} "
            f"nodes and {len(places)} places to cut; ask for at most {len(places) + 1} stages"
        )
    sums = [0.0, *itertools.accumulate(costs)]
    ends = [*places, len(costs)]  # where a stage may end
    low, high = sums[-1] / num_stages, sums[-1]
    for _ in range(60):  # halves the interval below the resolution of a float
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(sums, ends, num_stages, middle) else (middle, high)
    return _fewest_bytes(sums, places, cut_bytes, num_stages, high * (1 + TOLERANCE))


def bottleneck(costs: Sequence[float], positions: Sequence[int]) -> float:
    """The heaviest stage's cost under these cuts."""
    return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *positions, len(costs))))


def _fits(sums: list[float], ends: list[int], num_stages: int, cap: float) -> bool:
    """Whether every stage can stay within `cap`, filling stages greedily from the left."""
    start, at = 0.0, 0
    for stage in range(num_stages):
        last = len(ends) - (num_stages - stage)  # leave one end for each later stage
        reach = bisect_right(ends, start + cap, lo=at, hi=last + 1, key=lambda end: sums[end])
        if reach == at:
            return False
        at, start = reach, sums[ends[reach - 1]]
    return at == len(ends)


def _fewest_bytes(
    sums: list[float], places: list[int], cut_bytes: Sequence[float], num_stages: int, cap: float
) -> tuple[int, ...]:
    """Of the cuts whose stages stay within `cap`, those with the fewest bytes in sum (ties: the earliest)."""
    spots = [0, *places, len(sums) - 1]
    best: list[float] = [0.0] + [float("inf")] * (
        len(spots) - 1
    )  # fewest bytes with a stage ending at a spot
    back: list[list[int]] = []
    for _ in range(num_stages):
        window: deque[int] = deque()  # spots within reach, best increasing
        nearest, now, came = 0, [float("inf")] * len(spots), [-1] * len(spots)
        for i, spot in enumerate(spots[1:], start=1):
            while nearest < i:
                while window and best[window[-1]] > best[nearest]:
                    window.pop()
                window.append(nearest)
                nearest += 1
            while window and sums[spot] - sums[spots[window[0]]] > cap:
                window.popleft()
            if window and best[window[0]] < float("inf"):
                came[i] = window[0]
                now[i] = best[window[0]] + (cut_bytes[spot] if i < len(spots) - 1 else 0.0)
        best = now
        back.append(came)
    cuts, at = [], len(spots) - 1
    for came in reversed(back[1:]):
        at = came[at]
        cuts.append(spots[at])
    return tuple(reversed(cuts))
