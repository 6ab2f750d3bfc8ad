"""The picture: a PNG of the right make, whose boxes lie where the spans do."""

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from evenflow.ir import Costs, Flow, Span, Timeline
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.view import picture


def timeline_of(name: str, num_ranks: int, num_microbatches: int, seconds: float = 0.004) -> Timeline:
    costs = Costs.uniform(num_ranks, seconds, seconds, seconds)
    return simulate(get(name)(num_ranks, 1, num_microbatches), Flow.chain(num_ranks), costs)


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), [("gpipe", 2, 4), ("1f1b", 4, 8)])
def test_it_writes_a_png(tmp_path: Path, name: str, num_ranks: int, num_microbatches: int) -> None:
    path = tmp_path / "step.png"
    predicted = timeline_of(name, num_ranks, num_microbatches)
    measured = timeline_of(name, num_ranks, num_microbatches, seconds=0.005)
    picture.draw_timelines(path, predicted=predicted, measured=measured, title=name)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert width > height > 300


def test_it_leaves_pyplot_alone(tmp_path: Path) -> None:
    was_imported = "matplotlib.pyplot" in sys.modules
    timeline = timeline_of("gpipe", 2, 2)
    picture.draw_timelines(tmp_path / "step.png", predicted=timeline, measured=timeline, title="")
    assert ("matplotlib.pyplot" in sys.modules) is was_imported


def test_a_panel_shows_the_spans_from_their_first_start() -> None:
    spans = timeline_of("gpipe", 2, 2).spans
    later = [Span(s.rank, s.op, s.start_seconds + 99, s.end_seconds + 99) for s in spans]
    axes = Figure().subplots()
    picture._draw_panel(axes, Timeline.of(2, tuple(later)), "Measured")
    bars = [bar for bar in axes.collections if isinstance(bar, PolyCollection)]
    boxes = [path.get_extents() for bar in bars for path in bar.get_paths()]
    # Each rank: the grey lane first, then its ops in order; a forward takes 4 ms and a backward 8.
    assert [round(box.x0) for box in boxes] == [0, 0, 4, 20, 28, 0, 4, 8, 12, 20]
    assert [round(box.x1) for box in boxes] == [36, 4, 8, 28, 36, 36, 8, 12, 20, 28]
    assert axes.get_title(loc="left") == "Measured: makespan 36.00 ms, bubble 33.3%"
