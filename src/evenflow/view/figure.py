"""Figure: what all pictures have in common, their frame, their legend and their file.

matplotlib is imported when a picture is drawn and not before, because planning must start in milliseconds.
Its object interface is used with the Agg canvas, and never `pyplot`, which keeps figures in module state and
may look for a screen.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from evenflow.errors import ConfigError
from evenflow.ir.timeline import Timeline
from evenflow.view.lanes import DPI, legend_patches, write_names
from evenflow.view.palette import INK
from evenflow.view.svg import compact
from evenflow.view.units import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = ("svg", "png", "pdf")


def picture_format(path: str | PathLike[str]) -> str:
    """Return the format that a path asks for by its suffix; `ConfigError` for one that can't be drawn.

    >>> picture_format("out.svg")
    'svg'
    """
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in _FORMATS:
        raise ConfigError(f"cannot draw {path}: end its name in {', '.join('.' + name for name in _FORMATS)}")
    return suffix


def new_figure(width_inches: float, height_inches: float, title: str) -> Figure:
    """Return a figure with nothing but a title.

    >>> new_figure(9.0, 3.0, "GPipe").get_suptitle()
    'GPipe'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, horizontalalignment="left", fontsize=14, fontweight="bold", color=INK)
    return figure


def show_from_zero(axes: Axes, seconds: float, unit: Unit) -> None:
    """Let a panel's axis of time end at `seconds`, or a little behind."""
    axes.set_xlim(0.0, seconds / unit.size * 1.002 if seconds > 0 else 1.0)


def finish(
    figure: Figure, path: str | PathLike[str], panels: Sequence[tuple[Axes, Timeline]], unit: Unit
) -> None:
    """Add names and a legend to the panels that show timelines, and write the file, over what is there.

    Raises `ConfigError` as `picture_format`, and `OSError` where the file cannot be written.
    """
    patches = legend_patches(*(timeline for _, timeline in panels))
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=10)
    # The layout settles how wide the panels are, and that says which names fit.
    figure.draw_without_rendering()
    for axes, timeline in panels:
        write_names(axes, timeline, unit)
    figure.set_layout_engine("none")
    _save(figure, path)


def _save(figure: Figure, path: str | PathLike[str]) -> None:
    from matplotlib import rc_context

    suffix = picture_format(path)
    if suffix != "svg":
        figure.savefig(path, format=suffix)
        return
    # The same schedule makes the same file: no date, and no random names inside. Letters stay letters, which
    # can be searched and read aloud.
    with (
        rc_context({"svg.hashsalt": "evenflow", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}),
        io.StringIO() as written,
    ):
        figure.savefig(written, format=suffix, metadata={"Date": None})
        Path(path).write_text(compact(written.getvalue()), encoding="utf-8")
