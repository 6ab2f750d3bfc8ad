"""The pictures of docs/levers.md, drawn from the table that levers.py measures."""

import csv
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evenflow.ir.op import Backward, Forward, InputGrad
from evenflow.view.palette import INK, PURPLE, colour

BLUE, ORANGE, YELLOW = colour(Forward, 0.7), colour(Backward, 0.5), colour(InputGrad, 1.0)
GREY = (0.55, 0.55, 0.55)
_DPI = 110


@dataclass(frozen=True)
class Row:
    """What was measured of one setting: medians; of steps the quartiles, the least and the most too."""

    lever: str
    setting: str
    ranks: int
    stages: int
    schedule: str
    microbatch_size: int
    step_ms: float
    least_ms: float
    low_ms: float
    high_ms: float
    most_ms: float
    simulated_ms: float
    first_rank_busy_ms: float
    last_rank_busy_ms: float
    peak_mib: float

    @property
    def busy_ms(self) -> float:
        """The mean work of a rank."""
        return (self.first_rank_busy_ms + self.last_rank_busy_ms) / 2

    @property
    def idle(self) -> float:
        """The share of a step in which ranks compute nothing."""
        return 1 - self.busy_ms / self.step_ms


def read(table: Path) -> list[Row]:
    hints = typing.get_type_hints(Row)
    with table.open(newline="") as file:
        return [
            Row(**{key: hints[key](value) for key, value in each.items()}) for each in csv.DictReader(file)
        ]


def draw(table: Path, folder: Path) -> None:
    rows = read(table)

    def of(lever: str) -> list[Row]:
        return [row for row in rows if row.lever == lever]

    _microbatch_size(of("microbatch size"), folder / "microbatch_size.png")
    _schedule(of("schedule"), folder / "schedule.png")
    _stages(of("stages"), folder / "stages.png")
    _cut(of("cut"), folder / "cut.png")
    _memory({"1f1b": of("microbatch size"), "gpipe": of("microbatch size, gpipe")}, folder / "memory.png")


def _microbatch_size(rows: list[Row], path: Path) -> None:
    figure, axes = _figure(1, "Microbatch size: 16 rows a step, two ranks, 1f1b")
    ax = axes[0]
    sizes = [row.microbatch_size for row in rows]
    total = max(sizes)
    places = range(len(sizes))
    ranges = [[row.step_ms - row.low_ms for row in rows], [row.high_ms - row.step_ms for row in rows]]
    ax.errorbar(
        places,
        [row.step_ms for row in rows],
        ranges,
        color=INK,
        marker="o",
        lw=2,
        capsize=3,
        label="measured step (middle half of steps)",
    )
    ax.plot(
        places,
        [row.simulated_ms for row in rows],
        color=ORANGE,
        marker="s",
        lw=2,
        label="simulator, from the measured ops: no transfers",
    )
    ax.plot(
        places, [row.busy_ms for row in rows], color=BLUE, marker="^", lw=2, label="work of a rank: no bubble"
    )
    cheapest = min(row.busy_ms for row in rows)
    bubble = [cheapest * (1 + (row.ranks - 1) * row.microbatch_size / total) for row in rows]
    ax.plot(
        places, bubble, color=GREY, ls="--", lw=1.5, label="bubble alone: if rows cost the same at every size"
    )
    ax.set_xticks(list(places), [f"{size}\n({total // size})" for size in sizes])
    ax.set_xlabel("rows of a microbatch (number of microbatches)", color=INK)
    _finish(ax, "a step, ms")
    _legend_below(figure, ax, num_columns=2)
    _save(figure, path)


def _schedule(rows: list[Row], path: Path) -> None:
    figure, (left, right) = _figure(2, "Schedule: 8 microbatches of 2 rows, two ranks")
    names = [row.setting + (f" ({row.stages} stages)" if row.stages > row.ranks else "") for row in rows]
    _bars(left, names, rows)
    left.set_xlabel("a step, ms", color=INK)
    right.barh(names, [row.peak_mib for row in rows], color=PURPLE, height=0.6)
    right.invert_yaxis()
    right.set_yticks([])
    _numbers(right, [row.peak_mib for row in rows])
    right.set_xlabel("peak of tensors on the fullest rank, MiB", color=INK)
    _legend_below(figure, left)
    _save(figure, path)


def _stages(rows: list[Row], path: Path) -> None:
    figure, axes = _figure(1, "Stages: 16 rows a step (microbatches of 2; one of 16 on one rank)", height=3.2)
    _bars(axes[0], [row.setting for row in rows], rows)
    axes[0].set_xlabel("a step, ms", color=INK)
    _legend_below(figure, axes[0])
    _save(figure, path)


def _cut(rows: list[Row], path: Path) -> None:
    figure, (left, right) = _figure(
        2, "Where the cut is: 8 layers and a vocabulary of 16,384, two ranks", height=3.2
    )
    names = [row.setting for row in rows]
    _bars(left, names, rows)
    left.set_xlabel("a step, ms", color=INK)
    width = 0.38
    for number, (label, tone) in enumerate((("first rank", BLUE), ("last rank", ORANGE))):
        busy = [(row.first_rank_busy_ms, row.last_rank_busy_ms)[number] for row in rows]
        places = [place + (number - 0.5) * width for place in range(len(rows))]
        right.barh(places, busy, height=width * 0.95, color=tone, label=label)
        _numbers(right, busy, places)
    right.set_yticks([])
    right.invert_yaxis()
    right.set_xlabel("work of each rank in a step, ms", color=INK)
    right.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    _legend_below(figure, left)
    _save(figure, path)


def _memory(lines: dict[str, list[Row]], path: Path) -> None:
    figure, axes = _figure(1, "Memory: 16 rows a step, two ranks")
    ax = axes[0]
    for (name, rows), tone in zip(lines.items(), (BLUE, ORANGE), strict=True):
        places = range(len(rows))
        ax.plot(places, [row.peak_mib for row in rows], color=tone, marker="o", lw=2, label=name)
        ax.set_xticks(list(places), [f"{row.microbatch_size}\n({16 // row.microbatch_size})" for row in rows])
    ax.set_xlabel("rows of a microbatch (number of microbatches)", color=INK)
    _finish(ax, "peak of tensors on the fullest rank, MiB")
    ax.legend(frameon=False, fontsize=10)
    _save(figure, path)


def _bars(ax: Axes, names: list[str], rows: list[Row]) -> None:
    """Steps as bars: the work of a rank, then what it idles; the simulator's step as a mark."""
    ranges = [[row.step_ms - row.low_ms for row in rows], [row.high_ms - row.step_ms for row in rows]]
    ax.barh(names, [row.busy_ms for row in rows], color=BLUE, height=0.6, label="work of a rank (mean)")
    ax.barh(
        names,
        [row.step_ms - row.busy_ms for row in rows],
        left=[row.busy_ms for row in rows],
        color=(0.86, 0.86, 0.86),
        height=0.6,
        xerr=ranges,
        error_kw={"ecolor": INK, "capsize": 3, "lw": 1},
        label="the rest of the step (line: middle half of steps)",
    )
    ax.plot(
        [row.simulated_ms for row in rows],
        names,
        color=ORANGE,
        marker="|",
        ms=20,
        mew=2.5,
        ls="none",
        label="simulator",
    )
    for place, row in enumerate(rows):
        ax.text(
            0, place, f" {row.step_ms:.0f} ms", va="center", color="white", fontsize=10, fontweight="bold"
        )
    ax.invert_yaxis()
    ax.set_xlim(0)
    ax.tick_params(colors=INK)


def _numbers(ax: Axes, values: list[float], places: list[float] | None = None) -> None:
    for place, value in zip(places or range(len(values)), values, strict=True):
        ax.text(value, place, f" {value:.0f}", va="center", color=INK, fontsize=9)
    ax.set_xlim(0, 1.12 * max(ax.get_xlim()[1] / 1.05, *values))


def _figure(num_panels: int, title: str, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(11 if num_panels == 2 else 8.5, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes = figure.subplots(1, num_panels, squeeze=False, width_ratios=(3, 2)[:num_panels])
    found: list[Axes] = list(axes[0])
    for ax in found:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, found


def _finish(ax: Axes, label: str) -> None:
    ax.set_ylim(0)
    ax.set_ylabel(label, color=INK)
    ax.grid(axis="y", color=(0.9, 0.9, 0.9))
    ax.set_axisbelow(True)


def _legend_below(figure: Figure, ax: Axes, num_columns: int = 3) -> None:
    handles: tuple[list[Any], list[Any]] = ax.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower left", ncols=num_columns, frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")
