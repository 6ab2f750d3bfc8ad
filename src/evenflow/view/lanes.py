"""Lanes: a timeline drawn on a matplotlib panel, a lane for each rank.

Used by every picture. Thousands of boxes narrower than a pixel are drawn as one image a lane, whose colours
are mixed as the pixels' would be: a file of a hundred thousand boxes opens in no browser.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from evenflow.ir.op import Overlap, SimpleOp, parts
from evenflow.ir.timeline import Lane, Timeline
from evenflow.view.columns import computes, origin_seconds, slices, typical_seconds
from evenflow.view.palette import IDLE, INK, NAMES, PURPLE, WHITE, Colour, colour, colour_of, contrast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    from evenflow.view.units import Unit

DPI = 150
NAME_POINTS = 8.0
_DIGIT_WIDTH = 0.65  # of the default font, about, in units of its size
_STAGE_SHARE = 0.75  # of a name's size, where the stage stands beneath it
_LANE_FILL = 0.8
_POINTS_PER_INCH = 72.0
_MOST_RANKS_TOLD, _MOST_STAGES_TOLD = 16, 4  # whose stages stand beside their lanes
_NUM_COLUMNS = 1600  # of a lane drawn as an image: about a pixel each
_MIN_COLUMNS = 1.5  # of the typical op; below, a lane is drawn as an image


def draw_lanes(axes: Axes, timeline: Timeline, unit: Unit) -> None:
    """Draw the lanes from the first op's start, idle in grey, and each rank's busy share beside them."""
    makespan = timeline.makespan_seconds
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    is_dense = 0 < typical_seconds(timeline.lanes) < _MIN_COLUMNS * makespan / _NUM_COLUMNS
    num_microbatches, origin = _num_microbatches(timeline), origin_seconds(timeline)
    for rank, lane in enumerate(timeline.lanes):
        whole = (rank - _LANE_FILL / 2, _LANE_FILL)
        axes.broken_barh([(0.0, makespan / unit.size)], whole, facecolors=[IDLE], linewidth=0)
        if is_dense:
            pixels = _pixels(lane, origin, makespan / _NUM_COLUMNS, num_microbatches)
            axes.imshow(
                pixels,
                aspect="auto",
                interpolation="nearest",
                extent=(0.0, makespan / unit.size, rank + _LANE_FILL / 2, rank - _LANE_FILL / 2),
                zorder=2,
            )
        else:
            _draw_boxes(axes, _boxes(lane, rank, origin, unit), num_microbatches)
        busy = lane.busy_seconds / makespan if makespan > 0 else 0.0
        axes.annotate(
            f"{busy:.0%} busy",
            (1.0, rank),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=NAME_POINTS,
            color=INK,
            annotation_clip=False,
        )
    axes.set_yticks(range(timeline.num_ranks), _labels(timeline))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def write_names(axes: Axes, timeline: Timeline, unit: Unit) -> None:
    """Write a name on each box, if there is room, and above the lanes what the names say.

    A name is the microbatch; where a rank holds several stages it is the whole op (2F0) if that fits on every
    box, or else the microbatch with the stage small beneath it. The panel must have its final size.
    """
    num_microbatches, origin = _num_microbatches(timeline), origin_seconds(timeline)
    left, right = axes.get_xlim()
    window = axes.get_window_extent()
    points = _POINTS_PER_INCH / axes.get_figure(root=True).dpi  # type: ignore[union-attr]  # it is on a figure
    points_per_unit = window.width * points / (right - left)
    points_per_lane = window.height * points / timeline.num_ranks * _LANE_FILL
    # As many digits for each, or a row of equal boxes would lose its numbers half way.
    num_digits = len(str(num_microbatches - 1))
    boxes = [box for rank, lane in enumerate(timeline.lanes) for box in _boxes(lane, rank, origin, unit)]
    room = [
        (box, size, (box.width * points_per_unit - 2) / (_DIGIT_WIDTH * size))
        for box in boxes
        if (size := min(NAME_POINTS, 0.85 * points_per_lane * box.height / _LANE_FILL)) >= 4.0
    ]
    has_several_stages = any(len(stages) > 1 for stages in _stages(timeline))
    fit_all = all(num_fitting >= len(str(box.part)) for box, _, num_fitting in room)
    for box, size, num_fitting in room:
        middle = (box.start + box.width / 2, box.top + box.height / 2)
        write = partial(
            axes.annotate,
            xy=middle,
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="center_baseline",
            color=contrast(colour_of(box.part, num_microbatches)),
        )
        if has_several_stages and not fit_all and points_per_lane * box.height >= 2 * size * _LANE_FILL:
            if num_fitting >= num_digits:
                write(str(box.part.microbatch), xytext=(0, 0.35 * size), fontsize=size)
                write(str(box.part.stage), xytext=(0, -0.75 * size), fontsize=_STAGE_SHARE * size)
        elif has_several_stages and num_fitting >= len(str(box.part)):
            write(str(box.part), xytext=(0, 0), fontsize=size)
        elif num_fitting >= num_digits:
            write(str(box.part.microbatch), xytext=(0, 0), fontsize=size)
    several = "2F0: stage 2, forward, microbatch 0" if fit_all else "microbatch, and beneath it the stage"
    said = several if has_several_stages else "a number is a microbatch"
    axes.set_title(said, loc="right", fontsize=9, color=INK)


def legend_patches(*timelines: Timeline) -> list[Patch]:
    """Return what a legend shows: the kinds of ops that occur, and idleness."""
    from matplotlib.patches import Patch

    ops = {type(op) for timeline in timelines for lane in timeline.lanes for op, _, _ in computes(lane)}
    shown = ops | {type(part) for timeline in timelines for part in _overlapped(timeline)}
    patches = [
        Patch(facecolor=colour(kind, 0.5), label=name)
        for kind, name in NAMES.items()
        if kind in shown and kind is not Overlap
    ]
    if Overlap in ops:
        patches.append(Patch(facecolor=WHITE, edgecolor=PURPLE, label="overlap (both ops)"))
    return [*patches, Patch(facecolor=IDLE, label="idle")]


@dataclass(frozen=True, slots=True)
class _Box:
    """An op, or the upper or lower half of an overlap, in the panel's coordinates."""

    part: SimpleOp
    start: float
    width: float
    top: float
    height: float

    @property
    def is_half(self) -> bool:
        return self.height < _LANE_FILL


def _overlapped(timeline: Timeline) -> set[SimpleOp]:
    overlaps = (op for lane in timeline.lanes for op, _, _ in computes(lane) if isinstance(op, Overlap))
    return {part for op in overlaps for part in parts(op)}


def _stages(timeline: Timeline) -> list[list[int]]:
    """The stages of each rank, ascending."""
    return [
        sorted({part.stage for op, _, _ in computes(lane) for part in parts(op)}) for lane in timeline.lanes
    ]


def _labels(timeline: Timeline) -> list[str]:
    """The ranks' names; where some hold several stages and there is room, with their stages."""
    stages = _stages(timeline)
    if timeline.num_ranks > _MOST_RANKS_TOLD or not 1 < max(map(len, stages), default=0) <= _MOST_STAGES_TOLD:
        return [f"rank {rank}" for rank in range(timeline.num_ranks)]
    return [f"rank {rank}\nstages {', '.join(map(str, held))}" for rank, held in enumerate(stages)]


def _num_microbatches(timeline: Timeline) -> int:
    return 1 + max(
        (part.microbatch for lane in timeline.lanes for op, _, _ in computes(lane) for part in parts(op)),
        default=0,
    )


def _boxes(lane: Lane, rank: int, origin: float, unit: Unit) -> list[_Box]:
    return [
        _Box(
            part,
            (start - origin) / unit.size,
            (end - start) / unit.size,
            rank - _LANE_FILL / 2 + place * _LANE_FILL / len(parts(op)),
            _LANE_FILL / len(parts(op)),
        )
        for op, start, end in computes(lane)
        for place, part in enumerate(parts(op))
    ]


def _draw_boxes(axes: Axes, boxes: list[_Box], num_microbatches: int) -> None:
    for top, height in sorted({(box.top, box.height) for box in boxes}):
        level = [box for box in boxes if (box.top, box.height) == (top, height)]
        axes.broken_barh(
            [(box.start, box.width) for box in level],
            (top, height),
            facecolors=[colour_of(box.part, num_microbatches) for box in level],
            edgecolors=PURPLE if level[0].is_half else WHITE,
            linewidth=0.8 if level[0].is_half else 0.6,
            clip_on=False,  # they lie inside, and each would carry the name of its frame
        )


def _pixels(
    lane: Lane, origin: float, column_seconds: float, num_microbatches: int
) -> list[list[list[float]]]:
    """Return two rows of pixels: the tones of each column's ops, upper and lower halves, mixed by time."""
    rows = [[[0.0, 0.0, 0.0] for _ in range(_NUM_COLUMNS)] for _ in range(2)]
    idle = [1.0] * _NUM_COLUMNS
    for column, op, share in slices(
        lane, origin=origin, column_seconds=column_seconds, num_columns=_NUM_COLUMNS
    ):
        idle[column] -= share
        both = parts(op)
        for row, part in zip(rows, (both[0], both[-1]), strict=True):
            _mix(row[column], colour_of(part, num_microbatches), share)
    for row in rows:
        for pixel, share in zip(row, idle, strict=True):
            _mix(pixel, IDLE, share)
    # Shares add up to 1 but for rounding, which matplotlib would warn of.
    return [[[min(max(tone, 0.0), 1.0) for tone in pixel] for pixel in row] for row in rows]


def _mix(pixel: list[float], tone: Colour, share: float) -> None:
    for place, value in enumerate(tone):
        pixel[place] += share * value
