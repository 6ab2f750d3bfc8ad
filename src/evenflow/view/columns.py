"""Columns: a lane cut into columns of equal time, for drawings in which an op is narrower than a column."""

import statistics
from collections.abc import Iterable, Iterator

from evenflow.ir.op import ComputeOp
from evenflow.ir.timeline import Lane, Timeline


def origin_seconds(timeline: Timeline) -> float:
    """Return the first start of any compute op, where a drawing begins; 0 if none ran.

    >>> origin_seconds(Timeline(()))
    0.0
    """
    windows = [lane.window_seconds for lane in timeline.lanes]
    return min((window[0] for window in windows if window is not None), default=0.0)


def computes(lane: Lane) -> Iterator[tuple[ComputeOp, float, float]]:
    """Yield the compute ops of a lane, with their starts and ends in seconds.

    >>> from evenflow.ir.op import Forward
    >>> list(computes(Lane((Forward(0, 0),), (0.0,), (1.0,))))
    [(Forward(stage=0, microbatch=0), 0.0, 1.0)]
    """
    for op, start, end in zip(lane.ops, lane.start_seconds, lane.end_seconds, strict=True):
        if isinstance(op, ComputeOp):
            yield op, start, end


def typical_seconds(lanes: Iterable[Lane]) -> float:
    """Return the median length of the compute ops that take any time; 0 if none does.

    >>> from evenflow.ir.op import Forward
    >>> typical_seconds([Lane((Forward(0, 0), Forward(0, 1)), (0.0, 2.0), (2.0, 2.0))])
    2.0
    """
    lengths = [end - start for lane in lanes for _, start, end in computes(lane) if end > start]
    return statistics.median(lengths) if lengths else 0.0


def slices(
    lane: Lane, *, origin: float, column_seconds: float, num_columns: int
) -> Iterator[tuple[int, ComputeOp, float]]:
    """Yield each column that an op touches, the op, and its share of the column.

    >>> from evenflow.ir.op import Forward
    >>> lane = Lane((Forward(0, 0),), (0.5,), (2.0,))
    >>> [(column, share) for column, _, share in slices(lane, origin=0, column_seconds=1, num_columns=2)]
    [(0, 0.5), (1, 1.0)]
    """
    for op, start, end in computes(lane):
        left, right = (start - origin) / column_seconds, (end - origin) / column_seconds
        for column in range(int(left), min(int(right) + 1, num_columns)):
            share = min(right, column + 1) - max(left, column)
            if share > 0:
                yield column, op, share
