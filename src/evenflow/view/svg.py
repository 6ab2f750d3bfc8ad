"""SVG: what matplotlib writes, in less than half of its bytes, so that a picture can stand in a repository.

A name that nobody refers to, a comment and the sixth decimal of a coordinate go; a style that many elements
share is written once. What is seen stays the same. It is done on the text: building a tree of a large picture
takes longer than drawing it.
"""

import re

_HEAD = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_UNTURNED = re.compile(r' transform="rotate\(-?0 [^"]*"')
_NAME = re.compile(r' id="([^"]*)"')
_PLACE = re.compile(r' (d|x|y)="([^"]*)"')
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_STYLE = re.compile(r' style="([^"]*)"')
_GROUP_OF_ONE = re.compile(r"<g>\n(<text[^\n]*</text>)\n</g>")
_SHARED = '<style type="text/css">'


def compact(svg: str) -> str:
    r"""Return an SVG that matplotlib has written, with coordinates to a hundredth of a point.

    >>> compact('<style type="text/css"></style>\n<g id="a">\n<path d="M 0.123456 1 \nz" style="fill: red"/>')
    '<style type="text/css">.a{fill: red}</style>\n<g>\n<path d="M 0.12 1 z" class="a"/>'
    """
    svg = _HEAD.sub("", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    classes: dict[str, str] = {}

    def shorter(tag: re.Match[str]) -> str:
        text = _UNTURNED.sub("", tag[0])
        text = _NAME.sub(lambda found: found[0] if found[1] in used else "", text)
        text = _PLACE.sub(lambda found: f' {found[1]}="{_rounded(found[2])}"', text)
        return _STYLE.sub(
            lambda found: f' class="{classes.setdefault(found[1], _letters(len(classes)))}"', text
        )

    svg = _TAG.sub(shorter, svg)  # and not what is written between tags
    rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    svg = re.sub(r"\n\s+", "\n", svg.replace(_SHARED, _SHARED + rules, 1))
    return _GROUP_OF_ONE.sub(r"\1", svg)


def _rounded(places: str) -> str:
    short = _DECIMALS.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), places)
    return " ".join(short.split())


def _letters(number: int) -> str:
    """A short name for each number: a to z, then ba, bb and so on."""
    letters = ""
    while True:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
        if number == 0:
            return letters
