"""Schedule picture: a predicted timeline, and below it what each rank holds over time; SVG, PNG or PDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from os import PathLike
from typing import TYPE_CHECKING

from evenflow.ir.costs import ROUNDING, Costs
from evenflow.ir.schedule import Schedule
from evenflow.ir.timeline import Timeline
from evenflow.memory import memory_curve
from evenflow.view.columns import typical_seconds
from evenflow.view.figure import finish, new_figure, picture_format, show_from_zero
from evenflow.view.lanes import draw_lanes
from evenflow.view.palette import INK, RED
from evenflow.view.units import Unit, format_count, format_seconds, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIN_WIDTH_INCHES, _MAX_WIDTH_INCHES = 9.0, 13.0
_MARGIN_INCHES = 1.8  # of the panels: what stands beside them
_OP_INCHES = 0.22  # of the typical op: room for its name
_MEMORY_INCHES = 2.6
_NUM_COLUMNS = 800  # moments at which a curve is drawn, where it has more
_NUM_NAMED = 8  # ranks in the legend of the memory

MICROBATCHES = Unit("microbatches", 1.0)


def draw_schedule_picture(
    path: str | PathLike[str],
    schedule: Schedule,
    timeline: Timeline,
    costs: Costs,
    *,
    memory_unit: Unit = MICROBATCHES,
) -> None:
    """Write a picture of the step that `simulate` predicts: a lane for each rank, and the memory held.

    The suffix of `path` is the format. An existing file is replaced. Raises `ConfigError` for another suffix
    and `OSError` if the file can't be written.

    >>> import tempfile, pathlib
    >>> from evenflow.ir import Flow
    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> schedule, costs = gpipe(2, 1, 4), Costs.uniform(2)
    >>> timeline = simulate(schedule, Flow.chain(2), costs)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "step.svg"
    ...     draw_schedule_picture(path, schedule, timeline, costs)
    ...     path.read_text()[:5]
    '<?xml'
    """
    picture_format(path)  # refuses what cannot be drawn, before it takes its time
    num_ranks = timeline.num_ranks
    lanes_inches = num_ranks * max(0.16, min(0.5, 10.0 / num_ranks))
    # An evaluation keeps no activations: its memory has nothing to show.
    ratios = [lanes_inches, _MEMORY_INCHES] if schedule.trains else [lanes_inches]
    title = f"{schedule.name}: {format_sizes(schedule)}"
    figure = new_figure(_width_inches(timeline), 2.2 + sum(ratios), title)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    unit = time_unit(timeline.makespan_seconds)
    show_from_zero(panels[0], timeline.makespan_seconds, unit)
    draw_lanes(panels[0], timeline, unit)
    panels[0].set_title(_idleness(timeline), loc="left", fontsize=11, color=INK)
    if schedule.trains:
        _draw_memory(panels[1], timeline, costs, unit, memory_unit)
    panels[-1].set_xlabel(f"time ({unit.name})", color=INK)
    finish(figure, path, [(panels[0], timeline)], unit)


def _width_inches(timeline: Timeline) -> float:
    """Return a width at which names fit on the boxes; not wider than it must be, as pages scale it down."""
    typical = typical_seconds(timeline.lanes)
    num_ops = timeline.makespan_seconds / typical if typical > 0 else 0.0
    return min(max(_MARGIN_INCHES + num_ops * _OP_INCHES, _MIN_WIDTH_INCHES), _MAX_WIDTH_INCHES)


def format_sizes(schedule: Schedule) -> str:
    """Return how much there is to do, and for how many.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> format_sizes(gpipe(2, 1, 4))
    '2 stages on 2 ranks, 4 microbatches'
    """
    stages = format_count(schedule.placement.num_stages, "stage")
    ranks = format_count(schedule.placement.num_ranks, "rank")
    return f"{stages} on {ranks}, {format_count(schedule.num_microbatches, 'microbatch', 'es')}"


def _idleness(timeline: Timeline) -> str:
    return (
        f"span {format_seconds(timeline.span_seconds)}, idle {100 * timeline.span_bubble:.1f} %;  "
        f"makespan {format_seconds(timeline.makespan_seconds)}, idle {100 * timeline.bubble:.1f} %"
    )


def _draw_memory(axes: Axes, timeline: Timeline, costs: Costs, unit: Unit, memory_unit: Unit) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    num_ranks = timeline.num_ranks
    tones = colormaps["viridis"]
    # Evenly spread, and the first and the last always.
    named = {round(at * (num_ranks - 1) / (_NUM_NAMED - 1)) for at in range(_NUM_NAMED)}
    for rank in range(num_ranks):
        points = _thinned(memory_curve(timeline, costs, rank), timeline.makespan_seconds)
        axes.step(
            [0.0, *(seconds / unit.size for seconds, _ in points)],
            [0.0, *(held / memory_unit.size for _, held in points)],
            where="post",
            # Up to 0.9: the last tenth is a yellow that is hard to see on white.
            color=tones(0.9 * rank / max(1, num_ranks - 1)),
            linewidth=1.4 if num_ranks <= 16 else 0.8,
            label=f"rank {rank}" if rank in named else None,
        )
    caps = sorted(set(costs.memory_caps or ()))
    for cap in caps:
        if cap != float("inf"):
            label = (
                f"cap {cap / memory_unit.size:g}" if len(caps) == 1 else ("caps" if cap == caps[0] else None)
            )
            axes.axhline(cap / memory_unit.size, color=RED, linestyle="--", linewidth=1.2, label=label)
    axes.set_ylim(bottom=0.0)
    if memory_unit is MICROBATCHES:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_title(f"Activations held ({memory_unit.name})", loc="left", fontsize=11, color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, fontsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _thinned(points: Sequence[tuple[float, float]], makespan: float) -> list[tuple[float, float]]:
    """Return the points that can be told apart; of very many only the highest of each column: peaks stay."""
    # An end and the start that follows it may differ by a rounding, which would be drawn as a spike.
    apart = [
        point
        for point, following in pairwise([*points, (math.inf, 0.0)])
        if following[0] - point[0] > makespan * ROUNDING
    ]
    if len(apart) <= _NUM_COLUMNS:
        return apart
    columns = groupby(apart, key=lambda point: int(point[0] / makespan * _NUM_COLUMNS))
    return [*(max(column, key=lambda point: point[1]) for _, column in columns), apart[-1]]
