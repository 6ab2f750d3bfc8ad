"""Smaller SVGs show what matplotlib drew."""

import io
import re
from xml.etree import ElementTree as ET

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evenflow.view.svg import compact


@pytest.fixture(scope="module")
def written() -> str:
    """What matplotlib writes: boxes, lines, turned letters, and some that look like its own syntax."""
    figure = Figure(figsize=(6, 3))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.broken_barh([(at + 0.123456, 0.7) for at in range(40)], (0, 1), facecolors=["red", "blue"] * 20)
    axes.plot([0, 41], [1, 2])
    axes.imshow([[0.0, 1.0]], extent=(0, 41, 1, 2), aspect="auto")
    axes.set_title('1.23456 < d="1.23456" id="1" style="red" & more')
    axes.set_ylabel("turned")
    with rc_context({"svg.hashsalt": "evenflow", "svg.fonttype": "none"}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def elements(svg: str) -> list[ET.Element]:
    shown = {"path", "text", "use", "rect", "image"}
    return [each for each in ET.fromstring(svg).iter() if each.tag.rpartition("}")[2] in shown]


def styled(svg: str) -> list[str]:
    """The style of each element that is shown, wherever it is written."""
    rules = dict(re.findall(r"\.([a-z]+)\{([^}]*)\}", svg))
    return [each.get("style") or rules.get(each.get("class", ""), "") for each in elements(svg)]


def test_elements_texts_and_styles_stay(written: str) -> None:
    small = compact(written)
    assert [each.tag for each in elements(small)] == [each.tag for each in elements(written)]
    assert [each.text for each in elements(small)] == [each.text for each in elements(written)]
    assert styled(small) == styled(written)
    assert len(set(styled(small))) > 5


def test_places_stay_to_a_hundredth_of_a_point(written: str) -> None:
    def places(svg: str) -> list[list[float]]:
        return [
            [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", each.get(name, ""))]
            for each in elements(svg)
            for name in ("d", "x", "y")
        ]

    for small, large in zip(places(compact(written)), places(written), strict=True):
        assert small == pytest.approx(large, abs=0.0051)


def test_what_is_referred_to_keeps_its_name(written: str) -> None:
    small = compact(written)
    referred = set(re.findall(r"#([\w-]+)(?=[)\"])", small))
    assert referred == {each.get("id") for each in ET.fromstring(small).iter()} - {None}
    assert "rotate(-90" in small


def test_it_is_much_smaller(written: str) -> None:
    assert len(compact(written)) < 0.6 * len(written)
