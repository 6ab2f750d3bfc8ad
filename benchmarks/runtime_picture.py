"""The picture of the runtime beside others: how long a step takes of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evenflow.ir.op import Backward, Forward
from evenflow.view.palette import INK, colour

_DPI = 110
_OURS, _THEIRS, _NOBODYS = colour(Forward, 0.7), colour(Backward, 0.5), (0.7, 0.7, 0.7)


@dataclass(frozen=True)
class Bar:
    """A competitor's median, least and most, and its own ideal where it has one."""

    name: str
    median: float
    low: float
    high: float
    ideal: float | None


@dataclass(frozen=True)
class Panel:
    """A workload, and what is measured of it."""

    title: str
    unit: str
    bars: Sequence[Bar]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """One panel below the other; a bar is a median, a line the range, a mark the ideal."""
    heights = [len(panel.bars) + 2 for panel in panels]
    figure = Figure(figsize=(9, 0.3 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(every, panels, strict=True):
        for at, bar in enumerate(panel.bars):
            system = bar.name.split(",")[0]
            shade = _OURS if system == "ours" else _THEIRS if system in ("torch", "deepspeed") else _NOBODYS
            ax.barh(at, bar.median, color=shade, height=0.7)
            ax.plot([bar.low, bar.high], [at, at], color=INK, linewidth=1)
            if bar.ideal is not None:
                ax.plot([bar.ideal] * 2, [at - 0.4, at + 0.4], color=INK, linewidth=2)
        ax.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
        ax.invert_yaxis()
        ax.set_title(f"{panel.title}: {panel.unit}", loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
