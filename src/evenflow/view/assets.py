"""Assets: the pages that ship with the package, put together to one file that needs no network."""

import json
from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("uPlot.iife.min.js", "units.js", "elements.js", "ops.js", "lanes.js", "memory.js", "timeline.js")


def self_contained(name: str, *, title: str, data: object) -> str:
    """Return the page `name` (run, play) with its styles, its scripts and `data`, as JSON, inside of it.

    Raises `ValueError` where `data` holds a number that JSON does not know.

    >>> "<h1>" in self_contained("run", title="A run", data={"name": "</script>"})
    True
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Template(_read("frame.html")).substitute(
        body=_read(f"{name}.html"),
        title=_escaped(title),
        styles=_read("uPlot.min.css") + _read("style.css"),
        scripts="\n".join(map(_read, (*_SCRIPTS, f"{name}.js"))),
        # Nothing in it may end the element that it stands in.
        data=text.replace("<", "\\u003c"),
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
