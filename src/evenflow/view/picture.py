"""Picture: the predicted timeline above the measured one, on one time axis, as a PNG.

matplotlib is imported when a picture is drawn and not before, because planning must start in milliseconds.
Its object interface is used with the Agg canvas, and never `pyplot`, which keeps figures in module state and
may look for a screen.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias, assert_never

from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, SimpleOp, WeightGrad, parts
from evenflow.ir.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Colour: TypeAlias = tuple[float, float, float]

# Blue against orange is told apart with every common colour blindness: Okabe and Ito, "Color Universal
# Design", 2008. Each family runs from light to dark as the microbatches go on.
_FORWARD_LIGHT, _FORWARD_DARK = (0.70, 0.85, 0.96), (0.03, 0.32, 0.61)
_BACKWARD_LIGHT, _BACKWARD_DARK = (1.00, 0.85, 0.60), (0.76, 0.32, 0.00)
_INPUT_GRAD_LIGHT, _INPUT_GRAD_DARK = (0.98, 0.86, 0.93), (0.63, 0.29, 0.48)
_WEIGHT_GRAD_LIGHT, _WEIGHT_GRAD_DARK = (0.74, 0.92, 0.85), (0.00, 0.42, 0.31)
_IDLE = (0.91, 0.91, 0.91)
_INK = (0.13, 0.13, 0.13)

_DPI = 150
_WIDTH_INCHES = 13.0
_LANE_FILL = 0.8
_NAME_POINTS = 8.0
_POINTS_PER_INCH = 72.0


def draw_timelines(path: str | PathLike[str], *, predicted: Timeline, measured: Timeline, title: str) -> None:
    """Write a PNG that shows a prediction above what happened, in milliseconds from each one's first op.

    There is a lane for each rank. Forwards are blue and backwards orange, darker from microbatch to
    microbatch, and numbered where there is room (with the whole op where a rank holds several stages); grey
    is idle. The panels' titles give the makespan and the bubble. An existing file is replaced. Raises
    `OSError` if the file can't be written.

    >>> import tempfile, pathlib
    >>> from evenflow.ir import Costs, Flow
    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> timeline = simulate(gpipe(2, 1, 4), Flow.chain(2), Costs.uniform(2, 0.001, 0.001, 0.001))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "step.png"
    ...     draw_timelines(path, predicted=timeline, measured=timeline, title="GPipe")
    ...     path.read_bytes()[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_lanes = predicted.num_ranks + measured.num_ranks
    # Lanes get thinner as they get more, so that sixty-four still make a picture and not a banner.
    lane_inches = max(0.16, min(0.5, 16.0 / num_lanes))
    figure = Figure(
        figsize=(_WIDTH_INCHES, 2.5 + lane_inches * num_lanes),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12),
    )
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[predicted.num_ranks, measured.num_ranks])
    longest_ms = max(predicted.makespan_seconds, measured.makespan_seconds) * 1e3
    upper.set_xlim(0.0, longest_ms * 1.002 if longest_ms > 0 else 1.0)
    figure.suptitle(title, x=0.012, horizontalalignment="left", fontsize=14, fontweight="bold", color=_INK)
    _draw_panel(upper, predicted, "Predicted")
    _draw_panel(lower, measured, "Measured")
    lower.set_xlabel("time (ms)", color=_INK)
    _draw_legend(figure)
    # The layout settles how wide the panels are, and that says which names fit.
    figure.draw_without_rendering()
    for axes, timeline in ((upper, predicted), (lower, measured)):
        _write_names(axes, timeline)
    figure.set_layout_engine("none")
    figure.savefig(path, format="png")


@dataclass(frozen=True, slots=True)
class _Box:
    rank: int
    op: SimpleOp
    start_ms: float
    width_ms: float


def _boxes(timeline: Timeline) -> list[_Box]:
    computes = [span for span in timeline.spans if span.is_compute]
    origin = min((span.start_seconds for span in computes), default=0.0)
    boxes = []
    for span in computes:
        assert isinstance(span.op, ComputeOp), "these spans compute"
        # An overlap is drawn as its two ops, half of the time each.
        both = parts(span.op)
        width = span.seconds / len(both)
        boxes += [
            _Box(span.rank, op, (span.start_seconds + at * width - origin) * 1e3, width * 1e3)
            for at, op in enumerate(both)
        ]
    return boxes


def _draw_panel(axes: Axes, timeline: Timeline, name: str) -> None:
    boxes = _boxes(timeline)
    makespan_ms = timeline.makespan_seconds * 1e3
    num_microbatches = 1 + max((box.op.microbatch for box in boxes), default=0)
    for rank in range(timeline.num_ranks):
        lane = (rank - _LANE_FILL / 2, _LANE_FILL)
        axes.broken_barh([(0.0, makespan_ms)], lane, facecolors=[_IDLE], linewidth=0)
        own = [box for box in boxes if box.rank == rank]
        axes.broken_barh(
            [(box.start_ms, box.width_ms) for box in own],
            lane,
            facecolors=[_colour(box.op, num_microbatches) for box in own],
            edgecolors="white",
            linewidth=0.6,
        )
        busy = timeline.busy_seconds(rank) * 1e3 / makespan_ms if makespan_ms > 0 else 0.0
        axes.annotate(
            f"{busy:.0%} busy",
            (1.0, rank),
            xycoords=axes.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=_NAME_POINTS,
            color=_INK,
            annotation_clip=False,
        )
    axes.set_title(
        f"{name}: makespan {makespan_ms:.2f} ms, bubble {timeline.bubble:.1%}",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _write_names(axes: Axes, timeline: Timeline) -> None:
    boxes = _boxes(timeline)
    num_microbatches = 1 + max((box.op.microbatch for box in boxes), default=0)
    left, right = axes.get_xlim()
    points_per_ms = axes.get_window_extent().width / _DPI * _POINTS_PER_INCH / (right - left)
    # As many digits for each, or a row of equal boxes would lose its numbers half way.
    num_digits = len(str(num_microbatches - 1))
    for rank in range(timeline.num_ranks):
        own = [box for box in boxes if box.rank == rank]
        has_several_stages = len({box.op.stage for box in own}) > 1
        for box in own:
            # Digits of the default font are about 0.65 of its size wide.
            num_fitting = (box.width_ms * points_per_ms - 3) / (0.65 * _NAME_POINTS)
            if num_fitting < num_digits:
                continue
            op = str(box.op)
            axes.text(
                box.start_ms + box.width_ms / 2,
                rank,
                op if has_several_stages and num_fitting >= len(op) else str(box.op.microbatch),
                horizontalalignment="center",
                verticalalignment="center_baseline",
                fontsize=_NAME_POINTS,
                color=_contrast(_colour(box.op, num_microbatches)),
            )


def _draw_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    middle = 0.5
    handles = [
        Patch(facecolor=_blend(_FORWARD_LIGHT, _FORWARD_DARK, middle), label="forward"),
        Patch(facecolor=_blend(_BACKWARD_LIGHT, _BACKWARD_DARK, middle), label="backward"),
        Patch(facecolor=_IDLE, label="idle"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=10)


def _colour(op: SimpleOp, num_microbatches: int) -> _Colour:
    share = op.microbatch / max(1, num_microbatches - 1)
    match op:
        case Forward():
            return _blend(_FORWARD_LIGHT, _FORWARD_DARK, share)
        case Backward():
            return _blend(_BACKWARD_LIGHT, _BACKWARD_DARK, share)
        case InputGrad():
            return _blend(_INPUT_GRAD_LIGHT, _INPUT_GRAD_DARK, share)
        case WeightGrad():
            return _blend(_WEIGHT_GRAD_LIGHT, _WEIGHT_GRAD_DARK, share)
        case _:
            assert_never(op)


def _blend(light: _Colour, dark: _Colour, share: float) -> _Colour:
    red, green, blue = (low + (high - low) * share for low, high in zip(light, dark, strict=True))
    return red, green, blue


def _contrast(ground: _Colour) -> _Colour:
    """Return ink or white, whichever is the easier to read (weights: ITU-R BT.601 luma)."""
    red, green, blue = ground
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else (1.0, 1.0, 1.0)
