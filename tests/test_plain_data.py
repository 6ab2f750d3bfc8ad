"""Plain data becomes the dataclass that it describes, or is refused with its place."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from evenflow.errors import ConfigError
from evenflow.plain_data import read_as


@dataclass(frozen=True)
class Part:
    size: float


@dataclass(frozen=True)
class Whole:
    name: str
    kind: Literal["linear", "looped"]
    count: int
    parts: tuple[Part, ...]
    limit: float | None
    note: str = "none"


GOOD: dict[str, object] = {
    "name": "mine",
    "kind": "linear",
    "count": 3,
    "parts": [{"size": 2}, {"size": 0.5}],
}


def read(content: object) -> Whole:
    return read_as(Whole, content, lambda kind, place: 1 if kind is int else 0)


def test_every_kind_of_field_is_read() -> None:
    assert read(GOOD) == Whole("mine", "linear", 3, (Part(2.0), Part(0.5)), None, "none")
    assert read({**GOOD, "limit": 4, "note": "x"}) == Whole(
        "mine", "linear", 3, (Part(2.0), Part(0.5)), 4.0, "x"
    )
    assert read({**GOOD, "limit": None}).limit is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, r"^unknown key 'nmae'.*did you mean 'name'"),
        ({"name": 5}, "^name = 5 must be a string, in quotes"),
        ({"name": "\x1b[31mred"}, r"^name = '\\x1b\[31mred' must hold no control characters"),
        ({"kind": "round"}, "^kind = 'round' must be one of 'linear', 'looped'"),
        ({"count": 0}, "^count = 0 must be at least 1"),
        ({"count": 1.5}, "^count = 1.5 must be a whole number"),
        ({"count": True}, "^count = True must be a whole number"),
        ({"count": 2**63}, f"^count = {2**63} must be at most {2**63 - 1}"),
        ({"count": 10**101}, "^count = 1000.* must be finite, and smaller than 1e[+]100"),
        ({"parts": 5}, "^parts = 5 must be a list"),
        ({"parts": [{"size": 1}, 7]}, r"^parts\[1\] = 7 must be a table of keys"),
        ({"parts": [{"size": math.nan}]}, r"^parts\[0\].size = nan must be finite"),
        ({"parts": [{"size": -1}]}, r"^parts\[0\].size = -1 must be at least 0"),
        ({"parts": [{}]}, r"^parts\[0\].size is missing"),
        ({"limit": "1"}, "^limit = '1' must be a number"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({**GOOD, **change})


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^the whole = \[\] must be a table of keys"):
        read([])
