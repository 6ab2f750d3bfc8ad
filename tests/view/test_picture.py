"""The picture: a PNG of the right make, whose boxes lie where the spans do."""

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from evenflow.ir import Backward, Costs, Flow, Forward, Span, Timeline
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.view import picture
from evenflow.view.lanes import write_names
from evenflow.view.palette import colour_of


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


@pytest.mark.parametrize(("num_microbatches", "are_named"), [(4, True), (400, False)])
def test_names_are_written_where_there_is_room(num_microbatches: int, are_named: bool) -> None:
    timeline = timeline_of("gpipe", 2, num_microbatches)
    figure = Figure(figsize=(12, 3), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0.0, timeline.makespan_seconds * 1e3)
    picture._draw_panel(axes, timeline, "Predicted")
    num_texts = len(axes.texts)
    write_names(axes, timeline, picture._MS)
    assert len(axes.texts) - num_texts == (len(timeline.spans) if are_named else 0)


def test_families_differ_and_darken() -> None:
    forwards = [colour_of(Forward(0, microbatch), 4) for microbatch in range(4)]
    backwards = [colour_of(Backward(0, microbatch), 4) for microbatch in range(4)]
    assert all(colour[2] > colour[0] for colour in forwards)
    assert all(colour[0] > colour[2] for colour in backwards)
    for family in (forwards, backwards):
        assert sorted(family, key=sum, reverse=True) == family
