"""Picture: the predicted timeline above the measured one, on one time axis, as a PNG, SVG or PDF."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from evenflow.ir.timeline import Timeline
from evenflow.view.figure import finish, new_figure, picture_format, show_from_zero
from evenflow.view.lanes import draw_lanes
from evenflow.view.palette import INK
from evenflow.view.units import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES = 13.0
_MS = Unit("ms", 1e-3)


def draw_timelines(path: str | PathLike[str], *, predicted: Timeline, measured: Timeline, title: str) -> None:
    """Write a picture that shows a prediction above what happened, in milliseconds from each one's first op.

    There is a lane for each rank, in the colours of `palette`, darker from microbatch to microbatch, and
    numbered where there is room (with the whole op where a rank holds several stages); grey is idle, and an
    overlap shows both of its ops. The panels' titles give the makespan and the bubble. An existing file is
    replaced. Raises `ConfigError` for a suffix that is none of `.png`, `.svg` and `.pdf`, and `OSError` if
    the file can't be written.

    >>> import tempfile, pathlib
    >>> from evenflow.ir import Costs, Flow
    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> timeline = simulate(gpipe(2, 1, 4), Flow.chain(2), Costs.uniform(2, 0.001, 0.002))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "step.png"
    ...     draw_timelines(path, predicted=timeline, measured=timeline, title="GPipe")
    ...     path.read_bytes()[1:4]
    b'PNG'
    """
    picture_format(path)  # refuses what cannot be drawn, before it takes its time
    num_lanes = predicted.num_ranks + measured.num_ranks
    # Lanes get thinner as they get more, so that sixty-four still make a picture and not a banner.
    lane_inches = max(0.16, min(0.5, 16.0 / num_lanes))
    figure = new_figure(_WIDTH_INCHES, 2.5 + lane_inches * num_lanes, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[predicted.num_ranks, measured.num_ranks])
    show_from_zero(upper, max(predicted.makespan_seconds, measured.makespan_seconds), _MS)
    _draw_panel(upper, predicted, "Predicted")
    _draw_panel(lower, measured, "Measured")
    lower.set_xlabel("time (ms)", color=INK)
    finish(figure, path, [(upper, predicted), (lower, measured)], _MS)


def _draw_panel(axes: Axes, timeline: Timeline, name: str) -> None:
    draw_lanes(axes, timeline, _MS)
    makespan_ms = timeline.makespan_seconds / _MS.size
    axes.set_title(
        f"{name}: makespan {makespan_ms:.2f} ms, bubble {timeline.bubble:.1%}",
        loc="left",
        fontsize=11,
        color=INK,
    )
