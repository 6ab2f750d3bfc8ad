"""Texts of strangers: what is no regular file is not read, and what parsers choke on is refused by name."""

import os
from pathlib import Path

import pytest

from evenflow.errors import ConfigError
from evenflow.foreign import file_in_the_way, parse_json, parse_toml, read_text, read_toml, shown

HUGE = "9" * 5000  # more digits than Python converts


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path, reason in [
        (tmp_path, "it is no regular file"),
        (tmp_path / "pipe", "it is no regular file"),
        (tmp_path / "none", "No such file or directory"),
        (Path("a\0b"), "null byte"),
        (tmp_path / "bytes", "it is not UTF-8 text"),
        (tmp_path / "long", "it has more than 1 MiB"),
    ]:
        with pytest.raises(ConfigError, match=f"cannot read the plan .*: .*{reason}"):
            read_text(path, "plan", most_bytes=2**20)


def test_toml_is_read_and_its_file_is_named_where_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("rows = 3")
    assert read_toml(path, "plan") == {"rows": 3}
    path.write_text("rows =")
    with pytest.raises(ConfigError, match=r"plan.toml: this is no valid TOML: Invalid value"):
        read_toml(path, "plan")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"version = {HUGE}", "this is no valid TOML: Exceeds the limit"),
        ("a = " + "[" * 9000, "this is no valid TOML: maximum recursion depth"),
        ("\n" + "a." * 100 + "a = 1", r"line 2 has a key of more than 32 parts: 'a\.a\.a\."),
        ("[" + '"a\\"". ' * 100 + "a]", "line 1 has a key of more than 32 parts"),
    ],
)
def test_toml_that_its_parser_chokes_on(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        parse_toml(text)
    assert len(str(refused.value)) < 400


def test_a_name_of_many_parts_is_no_key() -> None:
    name = ".".join(f"block{number}" for number in range(30))
    assert parse_toml(f'first = "{name}"') == {"first": name}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, HUGE])
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="this is no JSON"):
        parse_json(text)


def test_a_wrong_value_is_shown_on_one_short_line() -> None:
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert shown("x" * 80) == "'" + "x" * 79 + "…"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "a list too large to be shown"


def test_a_file_where_a_folder_would_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert file_in_the_way(tmp_path / "runs" / "first") == tmp_path / "runs"
    assert file_in_the_way(tmp_path / "others" / "first") is None
