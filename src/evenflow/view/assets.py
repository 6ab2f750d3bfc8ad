"""Assets: the pages that ship with the package, put together to one file that needs no network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from evenflow.ir.op import Backward, Forward, InputGrad, Overlap, WeightGrad
from evenflow.view.palette import Colour, colour

_FOLDER = Path(__file__).parent / "page"


def self_contained(name: str, *, title: str, scripts: Sequence[str], data: object) -> str:
    """Return the page `name` with its styles, these scripts and `data`, as JSON, inside of it.

    Raises `ValueError` where `data` holds a number that JSON does not know.

    >>> "<h1>" in self_contained("run.html", title="A run", scripts=["run.js"], data={"name": "</script>"})
    True
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Template(_read(name)).substitute(
        title=_escaped(title),
        styles=_read("uPlot.min.css") + _read("style.css"),
        scripts="\n".join(map(_read, ("uPlot.iife.min.js", "timeline.js", *scripts))),
        # Nothing in it may end the element that it stands in.
        data=text.replace("<", "\\u003c"),
    )


def colours() -> Mapping[str, tuple[Colour, Colour]]:
    """Return the light and the dark end of each kind's colours, by its letter; "O" is an overlap.

    >>> sorted(colours())
    ['B', 'F', 'I', 'O', 'W']
    """
    kinds = {"F": Forward, "B": Backward, "I": InputGrad, "W": WeightGrad, "O": Overlap}
    return {
        letter: (_rounded(colour(kind, 0.0)), _rounded(colour(kind, 1.0))) for letter, kind in kinds.items()
    }


def _rounded(tone: Colour) -> Colour:
    red, green, blue = (round(part, 3) for part in tone)
    return red, green, blue


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
