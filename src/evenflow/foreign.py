"""Files from strangers: read as text, TOML or JSON, and refused by name where they are none, or too much.

Nothing here runs what it reads. Parsers of the standard library fail on some texts in ways of their own:
numbers of more digits than Python converts (`ValueError`), nesting (`RecursionError`), keys of so many parts
that the time grows with their square. All of these become a `ConfigError`.
"""

import json
import re
import stat
import tomllib
from pathlib import Path

from evenflow.errors import ConfigError

_MOST_BYTES = 2**26  # a schedule of five million ops has 40 MiB
_MOST_TOML_BYTES = 2**22  # of which the worst take ten seconds
_MOST_PARTS = 32  # of a key of TOML; tomllib takes time by their square
_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+"""
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:{_PART}\.[ \t]*+){{{_MOST_PARTS}}}")
_SHOWN = 80  # characters of a wrong value


def read_text(path: Path, what: str, *, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file that is `what`; raises `ConfigError`, naming it, where it cannot be read.

    Refused are what is no regular file (a pipe may never end), more than `most_bytes`, and no UTF-8.

    >>> read_text(Path("/dev/zero"), "plan")
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: cannot read the plan /dev/zero: it is no regular file
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            reason = "it is no regular file"
        elif found.st_size > most_bytes:
            reason = f"it has more than {most_bytes >> 20} MiB"
        else:
            return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text ({error})"
    except ValueError as error:  # a path that no file can have
        reason = str(error)
    raise ConfigError(f"cannot read the {what} {path}: {reason}")


def read_toml(path: Path, what: str) -> dict[str, object]:
    """The content of a TOML file; raises `ConfigError`, naming it, as `read_text` and `parse_toml`."""
    text = read_text(path, what, most_bytes=_MOST_TOML_BYTES)
    try:
        return parse_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_toml(text: str) -> dict[str, object]:
    """The content of a text of TOML; raises `ConfigError` where it is none, or is nested beyond use.

    >>> parse_toml("rows = 3")
    {'rows': 3}
    """
    if deep := _DEEP_KEY.search(text):
        line = text.count("\n", 0, deep.start()) + 1
        raise ConfigError(f"line {line} has a key of more than {_MOST_PARTS} parts: {shown(deep[0])}")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the first also for numbers of thousands of digits
        raise ConfigError(f"this is no valid TOML: {error}") from error


def parse_json(text: str) -> object:
    """The content of a text of JSON; raises `ConfigError` where it is none, or is nested beyond use.

    >>> parse_json('{"rows": 3}')
    {'rows': 3}
    """
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this is no JSON: {error}") from error
    return found


def shown(value: object) -> str:
    r"""A wrong value as a message can hold it: on one line, not too long, without control characters.

    >>> shown("a\x1b[31m"), shown([0] * 100)[-4:], shown(16**5000)
    ("'a\\x1b[31m'", ', 0…', 'an int too large to be shown')
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; too many tables in one another
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} too large to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_file_name(value: object) -> bool:
    """Whether a value is the name of a file in whatever folder it is joined to, and of none elsewhere.

    >>> [is_file_name(each) for each in ("weights.bin", "../weights.bin", "/weights.bin", "..", 5)]
    [True, False, False, False, False]
    """
    return isinstance(value, str) and value.isprintable() and Path(value).name == value not in ("", "..")


def file_in_the_way(folder: Path) -> Path | None:
    """What is no folder where `folder`, or one that it lies in, would be made; None where it can be.

    >>> file_in_the_way(Path("/dev/null/runs/first"))
    PosixPath('/dev/null')
    """
    found = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return None if found is None or found.is_dir() else found


def visible(text: str) -> str:
    r"""The text with every character that a terminal would obey written out; lines stay lines.

    >>> visible("no\x1b[31m\nend")
    'no\\x1b[31m\nend'
    """
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
