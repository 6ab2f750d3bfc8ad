"""Hypothesis strategies that damage real files: their bytes, their lines, and what a parser makes of them."""

import copy
import json
import math
import tomllib
from typing import Any

from hypothesis import strategies as st

BYTES = st.binary(min_size=1, max_size=12)
NASTY_WORDS = (
    "",
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "1e400",
    "9" * 5000,
    "[" * 3000,
    "a." * 3000,
    '"',
    '"""',
    "\x1b[31m",
    "\u202e",
    "\0",
    "../../etc/passwd",
    "x" * 70_000,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file with one to three of its bytes, pieces or lines changed."""
    made = whole
    for _ in range(draw(st.integers(1, 3))):
        made = _damaged_once(draw, made)
    return made


def _damaged_once(draw: st.DrawFn, whole: bytes) -> bytes:
    at = draw(st.integers(0, len(whole)))
    match draw(
        st.sampled_from(("flip", "delete", "insert", "end", "word", "twice", "gone", "swap", "binary"))
    ):
        case "flip":
            return whole[:at] + bytes([draw(st.integers(0, 255))]) + whole[at + 1 :]
        case "delete":
            return whole[:at] + whole[at + draw(st.integers(1, 40)) :]
        case "insert":
            return whole[:at] + draw(BYTES) + whole[at:]
        case "end":
            return whole[:at]
        case "word":
            return whole[:at] + draw(st.sampled_from(NASTY_WORDS)).encode() + whole[at:]
        case "binary":
            return whole[:at] + b"\xff\xfe\x80" + whole[at:]
        case kind:
            lines = whole.splitlines(keepends=True) or [b""]
            one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            if kind == "twice":
                lines.insert(other, lines[one])
            elif kind == "gone":
                del lines[one]
            else:
                lines[one], lines[other] = lines[other], lines[one]
            return b"".join(lines)


CELLS = (
    "0F0",
    "0B0",
    "0I0",
    "0W0",
    "1F0",
    "9F9",
    "0F1&0B0",
    "0F" + "9" * 30,
    "0F" + "9" * 5000,
    "S0>1F0",
    "G0",
    "x",
    "",
)


class Digits(str):
    """A number written as it stands, of more digits than Python would write."""


WRONG_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 10**9, 10**18, 2**64, 10**99, Digits("9" * 5000), Digits("0x" + "f" * 5000)),
    *(0.0, -0.5, 0.5, 1.0, 1e18, 1e99, 1e-320, 5e-324, math.nan, math.inf, -math.inf, True),
    *(
        "",
        "auto",
        "1f1b",
        "gpipe",
        "forward-only",
        "zb-h1",
        "none",
        "fsdp",
        "\x1b[31mred",
        "x" * 100_000,
        "../..",
    ),
    *([], [[]], [1] * 50_000, ["0F0"], ["0F0,0B0", "1F0,1B0"], {}, {"a": {"b": 1}}),
)


def _places(tree: Any) -> list[tuple[Any, ...]]:
    """Where every value of a tree is: the keys and positions that lead to it."""
    found: list[tuple[Any, ...]] = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += [(key,), *((key, *rest) for rest in _places(value))]
    return found


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


@st.composite
def damaged_tree(draw: st.DrawFn, whole: Any, *, changes: int = 2) -> Any:
    """A copy of a tree of dicts and lists with a few of its values or keys changed."""
    made = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, changes))):
        places = _places(made)
        if not places:
            break
        *upper, key = draw(st.sampled_from(places))
        inside = _at(made, tuple(upper))
        what = draw(
            st.sampled_from(("wrong", "wrong", "words", "other", "gone", "new key", "twice", "nudge"))
        )
        if what == "wrong":
            inside[key] = copy.deepcopy(draw(st.sampled_from(WRONG_VALUES)))
        elif isinstance(inside[key], str) and "," in inside[key]:  # a row of ops
            words = inside[key].split(",")
            one, other = (draw(st.integers(0, len(words) - 1)) for _ in range(2))
            words[one], words[other] = words[other], draw(st.sampled_from((words[one], *CELLS)))
            inside[key] = ",".join(words)
        elif what == "other":  # of its own kind, from another place in the same file
            alike = [place for place in places if place[-1] == key or isinstance(key, int)]
            inside[key] = copy.deepcopy(_at(made, draw(st.sampled_from(alike))))
        elif what == "gone":
            del inside[key]
        elif what == "twice" and isinstance(inside, list):
            inside.append(inside[key])
        elif what == "nudge" and type(inside[key]) in (int, float):
            inside[key] += draw(st.sampled_from((-2, -1, 1, 2)))
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(("unknown", "\x1b[2J", "x" * 10_000, "rank", "order")))] = 1
    return made


def as_toml(tree: Any) -> str:
    """A tree as TOML, whatever is in it; what is None is left out."""
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in tree.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, Digits) else _key(value) if isinstance(value, str) else repr(value)


def _key(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


@st.composite
def damaged_toml(draw: st.DrawFn, texts: tuple[str, ...]) -> bytes:
    """One of some TOML files, damaged."""
    text = draw(st.sampled_from(texts))
    if draw(st.booleans()):
        return draw(damaged_bytes(text.encode()))
    return as_toml(draw(damaged_tree(tomllib.loads(text)))).encode("utf-8", "surrogatepass")


HEADS = (
    "# placement: 0,1",
    "# placement: 1,0",
    "# placement: 0,999999999",
    "# placement: " + "0," * 30_000 + "1",
    "# placement: 0,-1",
    "# placement: x",
    "# placment: 0,1",
    "# name: \x1b[31mred",
    "# name: " + "x" * 100_000,
    "# name:",
    "0F0," * 20_000,
    ",".join(f"0F{number}" for number in range(2_000)),
)


@st.composite
def damaged_schedule(draw: st.DrawFn, texts: tuple[str, ...]) -> bytes:
    """One of some schedule files, damaged: its bytes, or its cells."""
    text = draw(st.sampled_from(texts))
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(text.encode()))
    rows = [line.split(",") if line[0] != "#" else [line] for line in text.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        other = draw(st.integers(0, len(rows) - 1))
        at = draw(st.integers(0, max(0, len(rows[row]) - 1)))
        to = draw(st.integers(0, len(rows[other])))
        match draw(st.sampled_from(("swap", "move", "twice", "gone", "cell", "head", "row", "next"))):
            case "next" if at + 1 < len(rows[row]):
                rows[row][at], rows[row][at + 1] = rows[row][at + 1], rows[row][at]
            case "swap" if rows[row]:
                there = draw(st.integers(0, len(rows[row]) - 1))
                rows[row][at], rows[row][there] = rows[row][there], rows[row][at]
            case "move" if rows[row]:
                rows[other].insert(to, rows[row].pop(at))
            case "twice" if rows[row]:
                rows[other].insert(to, rows[row][at])
            case "gone" if rows[row]:
                del rows[row][at]
            case "cell" if rows[row]:
                rows[row][at] = draw(st.sampled_from(CELLS))
            case "head":
                rows.insert(row, [draw(st.sampled_from(HEADS))])
            case _:
                rows[row], rows[other] = rows[other], rows[row]
    return "\n".join(",".join(row) for row in rows).encode()
