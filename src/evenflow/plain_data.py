"""Plain data, as TOML and JSON hold it, read as the dataclass that it describes, with every value checked.

What is read may come from a stranger: nothing of it runs, and what is wrong is said with its place.
"""

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin

from evenflow.cluster.names import nearest
from evenflow.errors import ConfigError
from evenflow.foreign import shown

_LARGEST = 1e100  # sums and products of such numbers are still finite
_LARGEST_WHOLE = 2**63 - 1

T = TypeVar("T")
# The least that a number of this type, at this place, may be.
Least = Callable[[type[int] | type[float], str], float]


def read_as(kind: type[T], content: object, least: Least, place: str = "") -> T:
    """Return the dataclass `kind` with the values that `content`, a mapping, has under its fields' names.

    Fields are whole numbers, numbers, strings, literals, dataclasses, tuples of one of these, or one of these
    or None; only what may be None, or has a default, may be left out. Raises `ConfigError` for a key that is
    unknown or missing, a value of the wrong type, a number that is not finite or below `least`, and a string
    with control characters, which a terminal would obey.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     rows: int
    ...     name: str | None
    >>> read_as(Size, {"rows": 3}, lambda kind, place: 1)
    Size(rows=3, name=None)
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place or 'the whole'} = {shown(content)} must be a table of keys")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # `kind` is a dataclass
    for key in content:
        if key not in known:
            raise ConfigError(f"unknown key {shown(_full(place, key))}{nearest(key, tuple(known))}")
    values = {}
    for name, field in known.items():
        optional = isinstance(hints[name], types.UnionType)
        if name in content and not (optional and content[name] is None):
            values[name] = _value(hints[name], content[name], least, _full(place, name))
        elif optional:
            values[name] = None
        elif field.default is MISSING:
            raise ConfigError(f"{_full(place, name)} is missing")
    return kind(**values)


# hint: a type, an alias or a union, for which Python has no common type.
def _value(hint: Any, given: object, least: Least, place: str) -> object:
    if isinstance(hint, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not types.NoneType)
    if is_dataclass(hint):
        return read_as(typing.cast("type[Any]", hint), given, least, place)
    if get_origin(hint) is tuple:
        if not isinstance(given, list):
            raise ConfigError(f"{place} = {shown(given)} must be a list")
        return tuple(
            _value(get_args(hint)[0], each, least, f"{place}[{at}]") for at, each in enumerate(given)
        )
    if get_origin(hint) is typing.Literal:
        if given not in get_args(hint):
            raise ConfigError(
                f"{place} = {shown(given)} must be one of {', '.join(map(repr, get_args(hint)))}"
            )
        return given
    if hint is str:
        if not isinstance(given, str):
            raise ConfigError(f"{place} = {shown(given)} must be a string, in quotes")
        if not given.isprintable():
            raise ConfigError(f"{place} = {shown(given)} must hold no control characters")
        return given
    return _number(hint, given, least(hint, place), place)


def _number(hint: type[int] | type[float], given: object, least: float, place: str) -> float:
    whole = isinstance(given, int) and not isinstance(given, bool)
    if not (whole or (hint is float and isinstance(given, float))):
        raise ConfigError(f"{place} = {shown(given)} must be a {'whole ' if hint is int else ''}number")
    assert isinstance(given, int | float), "checked"
    if not -_LARGEST < given < _LARGEST:  # also where it is no number (nan)
        raise ConfigError(f"{place} = {shown(given)} must be finite, and smaller than {_LARGEST:g}")
    if given < least:
        raise ConfigError(f"{place} = {shown(given)} must be at least {least:g}")
    if hint is int and given > _LARGEST_WHOLE:
        raise ConfigError(f"{place} = {shown(given)} must be at most {_LARGEST_WHOLE}")
    return hint(given)


def _full(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
