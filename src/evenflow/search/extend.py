"""Extend: make a schedule for many microbatches from one for few, by repeating its steady state.

Somewhere in the middle of a good schedule each rank repeats itself. A *window* of a rank's string that holds
each of its letters equally often leaves the memory as it was, so it can stand there any number of times. The
windows of all ranks must belong together: each is the one nearest to a common moment of the timeline.

Often the weight gradients pile up towards the end, so that no window holds them all. Without them the string
still has windows, and they are decoded anew (`timing`, lazy).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenflow.search.tables import Ints, Tables
from evenflow.search.timing import Letters, Trace

MOST_REPEATS = 4  # microbatches in a window
MOMENTS = np.linspace(0.1, 0.9, 65)  # where a window may begin, as shares of the schedule


class Extension(NamedTuple):
    """An order for more microbatches, and whether its weight gradients are left out."""

    order: Letters
    lengths: Ints
    lazy: bool


def windows(letters: Letters, num_letters: int, repeats: int) -> Ints:
    """Return where windows of one string begin that hold each letter `repeats` times.

    >>> windows(np.array([0, 0, 1, 2, 0, 1, 2, 1, 2], np.int16), num_letters=3, repeats=1).tolist()
    [1, 2, 3, 4]
    """
    size = num_letters * repeats
    if len(letters) < size:
        return np.zeros(0, np.int64)
    kinds, index = np.unique(letters, return_inverse=True)
    seen = np.zeros((len(letters) + 1, len(kinds)), np.int64)
    seen[1:] = np.cumsum(np.eye(len(kinds), dtype=np.int64)[index], axis=0)
    return np.flatnonzero((seen[size:] - seen[:-size] == repeats).all(axis=1))


def extensions(tables: Tables, trace: Trace, *, extra: int) -> Iterator[Extension]:
    """Yield orders for `extra` more microbatches than the schedule in `trace` has. There may be none.

    The trace may be used again once all are made.
    """
    for lazy in (False, True):
        strings = [_string(tables, trace, rank, lazy=lazy) for rank in range(len(trace.counts))]
        for repeats in range(1, MOST_REPEATS + 1):
            if extra % repeats == 0:
                yield from _extended(tables, strings, extra // repeats, repeats, lazy=lazy)


class _String(NamedTuple):
    letters: Letters
    starts: npt.NDArray[np.float64]


def _string(tables: Tables, trace: Trace, rank: int, *, lazy: bool) -> _String:
    count = trace.counts[rank]
    letters, starts = trace.letters[rank, :count].copy(), trace.starts[rank, :count].copy()
    kept = letters < 2 * len(tables.rank_of) if lazy else np.ones(count, np.bool_)
    return _String(letters[kept], starts[kept])


def _extended(
    tables: Tables, strings: list[_String], times: int, repeats: int, *, lazy: bool
) -> Iterator[Extension]:
    per_rank = np.diff(tables.stage_start) * (2 if lazy else 3)
    begins = [
        windows(string.letters, int(num), repeats) for string, num in zip(strings, per_rank, strict=True)
    ]
    if not all(len(found) for found in begins):
        return
    end = max(float(string.starts[-1]) for string in strings)
    known = set()
    for moment in MOMENTS * end:
        cuts = tuple(
            int(found[np.abs(string.starts[found] - moment).argmin()])
            for string, found in zip(strings, begins, strict=True)
        )
        if cuts not in known:
            known.add(cuts)
            yield Extension(*_repeated(strings, cuts, per_rank * repeats, times), lazy)


def _repeated(strings: list[_String], cuts: tuple[int, ...], sizes: Ints, times: int) -> tuple[Letters, Ints]:
    longer = [
        np.concatenate((letters[:cut], np.tile(letters[cut : cut + size], times), letters[cut:]))
        for (letters, _), cut, size in zip(strings, cuts, sizes, strict=True)
    ]
    lengths = np.array([len(letters) for letters in longer], np.int64)
    order = np.zeros((len(longer), int(lengths.max())), np.int16)
    for rank, letters in enumerate(longer):
        order[rank, : len(letters)] = letters
    return order, lengths
