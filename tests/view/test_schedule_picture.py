"""The picture of a schedule: its formats, its two panels, and the memory that it shows."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from matplotlib.figure import Figure

from evenflow.errors import ConfigError
from evenflow.ir import Costs, Flow
from evenflow.memory import peak_bytes
from evenflow.schedules.catalog import get
from evenflow.simulate import simulate
from evenflow.view import schedule_picture
from evenflow.view.schedule_picture import MICROBATCHES, draw_schedule_picture
from evenflow.view.units import Unit


def draw(path: Path, name: str = "1f1b", num_ranks: int = 3, num_microbatches: int = 4, **changes) -> None:
    schedule = get(name)(num_ranks, 1, num_microbatches)
    costs = replace(Costs.uniform(num_ranks), **changes)
    timeline = simulate(schedule, Flow.chain(num_ranks), costs)
    draw_schedule_picture(path, schedule, timeline, costs)


@pytest.mark.parametrize(
    ("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")]
)
def test_the_suffix_is_the_format(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"out.{suffix}"
    draw(path)
    assert path.read_bytes().startswith(begins)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out.jpg: end its name in .svg, .png, .pdf"):
        draw(tmp_path / "out.jpg")


def test_an_svg_is_the_same_each_time(tmp_path: Path) -> None:
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    draw(one)
    draw(other)
    assert one.read_bytes() == other.read_bytes()
    assert ET.parse(one).getroot().tag.endswith("svg")


@pytest.mark.parametrize(("num_microbatches", "inches"), [(2, 9.0), (13, 1.8 + 42 * 0.22), (200, 13.0)])
def test_a_picture_is_as_wide_as_its_names_need(num_microbatches: int, inches: float) -> None:
    timeline = simulate(get("zb-h1")(4, 1, num_microbatches), Flow.chain(4), Costs.uniform(4))
    assert schedule_picture._width_inches(timeline) == pytest.approx(inches)


def test_microbatches_are_counted_in_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    draw(path, "sequential")
    written = re.findall(r">([^<>]+)</text>", path.read_text())
    memory = written[written.index("Activations held (microbatches)") - 2 :]
    assert memory[:2] == ["0", "1"]


def test_it_leaves_pyplot_alone(tmp_path: Path) -> None:
    was_imported = "matplotlib.pyplot" in sys.modules
    draw(tmp_path / "out.png")
    assert ("matplotlib.pyplot" in sys.modules) is was_imported


@pytest.mark.parametrize(("name", "num_panels"), [("zb-h1", 2), ("forward-only", 1)])
def test_an_evaluation_shows_no_memory(tmp_path: Path, monkeypatch, name: str, num_panels: int) -> None:
    figures = []
    saved = Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return saved(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(tmp_path / "out.svg", name)
    (figure,) = figures
    assert len(figure.axes) == num_panels
    assert figure.get_suptitle() == f"{name}: 3 stages on 3 ranks, 4 microbatches"
    assert "idle" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("num_microbatches", [4, 3000])
def test_the_memory_shows_the_peaks_and_the_cap(num_microbatches: int) -> None:
    schedule = get("1f1b")(2, 1, num_microbatches)
    costs = replace(Costs.uniform(2), memory_caps=(4.0, 4.0))
    timeline = simulate(schedule, Flow.chain(2), costs)
    axes = Figure().subplots()
    schedule_picture._draw_memory(axes, timeline, costs, Unit("s", 1.0), Unit("halves", 0.5))
    *ranks, cap = axes.get_lines()
    assert [max(line.get_ydata()) / 2 for line in ranks] == list(peak_bytes(schedule, costs))
    assert [line.get_ydata()[-1] for line in ranks] == [0.0, 0.0]
    assert all(len(line.get_xdata()) <= 803 for line in ranks)
    assert (list(cap.get_ydata()), cap.get_label()) == ([8.0, 8.0], "cap 8")
    assert axes.get_title(loc="left") == "Activations held (halves)"


def test_ranks_of_different_caps_have_a_line_each() -> None:
    schedule = get("1f1b")(3, 1, 4)
    costs = replace(Costs.uniform(3), memory_caps=(4.0, 3.0, float("inf")))
    axes = Figure().subplots()
    timeline = simulate(schedule, Flow.chain(3), costs)
    schedule_picture._draw_memory(axes, timeline, costs, Unit("s", 1.0), MICROBATCHES)
    assert [line.get_ydata()[0] for line in axes.get_lines()[3:]] == [3.0, 4.0]


def test_moments_that_differ_by_a_rounding_are_one() -> None:
    points = ((0.0, 1.0), (5.0, 0.0), (5.0 + 1e-14, 1.0), (9.0, 0.0))
    assert schedule_picture._thinned(points, 10.0) == [(0.0, 1.0), (5.0 + 1e-14, 1.0), (9.0, 0.0)]
