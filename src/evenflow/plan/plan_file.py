"""A plan as TOML that a person can read and edit. It is data: reading runs nothing, and checks every value.

Each class of `plan.py` is a table, each of its fields a key. What decides stands first (degrees, schedule,
sizes, the stages' first nodes and what they recompute); what is predicted may be left as it is.
"""

import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from evenflow.cluster.names import nearest
from evenflow.errors import ConfigError
from evenflow.plan.plan import Plan

_VERSION = 1
_HEADER = """\
# A plan of Evenflow. Stages begin with the node called "first" and end before the next stage's; seconds and
# bytes are of one microbatch. After a change of [[stages]] the predictions are those of the plan before it.
"""

T = TypeVar("T")


def write_plan(plan: Plan) -> str:
    """Return the text of a plan; the inverse of `read_plan`."""
    lines = [_HEADER + f"version = {_VERSION}"]
    tables = []
    for field in fields(plan):
        value = getattr(plan, field.name)
        if is_dataclass(value):
            tables += ["", f"[{field.name}]", *_keys(value)]
        elif isinstance(value, tuple):
            for each in value:
                tables += ["", f"[[{field.name}]]", *_keys(each)]
        else:
            lines.append(f"{field.name} = {_written(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _keys(value: Any) -> list[str]:  # value: a dataclass
    given = ((field.name, getattr(value, field.name)) for field in fields(value))
    return [f"{name} = {_written(each)}" for name, each in given if each is not None]


def _written(value: Any) -> str:  # value: a number, a string, a tuple of strings, a dataclass
    if is_dataclass(value):
        return f"{{ {', '.join(_keys(value))} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def read_plan(text: str) -> Plan:
    """Read a plan from its text.

    Raises `ConfigError` for what is no TOML, for a key that is unknown or missing, and for a value of the
    wrong type or below 0, each with its place in the file.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"this is no plan: it is not TOML ({error})") from error
    version = content.pop("version", None)
    if version != _VERSION:
        raise ConfigError(
            f"version = {version!r}: this Evenflow reads plans of version {_VERSION}; plan again"
        )
    plan = _read(Plan, content, "")
    num_ranks = plan.degrees.pipeline
    if len(plan.ranks) != num_ranks:
        raise ConfigError(
            f"[[ranks]] names {len(plan.ranks)} pipeline ranks, and degrees.pipeline = {num_ranks}"
        )
    if len(plan.stages) != num_ranks * plan.stages_per_rank:
        raise ConfigError(
            f"[[stages]] names {len(plan.stages)} stages, and {num_ranks} ranks of {plan.stages_per_rank} "
            f"stages hold {num_ranks * plan.stages_per_rank}"
        )
    return plan


def read_plan_file(path: Path) -> Plan:
    """Read a plan from a file; `ConfigError` as `read_plan`, and for a file that can't be read."""
    try:
        return read_plan(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from error
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _read(kind: type[T], content: object, place: str) -> T:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place} = {content!r} must be a table")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # `kind` is a dataclass
    for key in content:
        if key not in known:
            raise ConfigError(f"unknown key {_full(place, key)!r}{nearest(key, tuple(known))}")
    values = {}
    for name, field in known.items():
        if name in content:
            values[name] = _value(hints[name], content[name], _full(place, name))
        elif isinstance(hints[name], types.UnionType):
            values[name] = None  # TOML has no word for it
        elif field.default is MISSING:
            raise ConfigError(f"{_full(place, name)} is missing")
    return kind(**values)


def _value(hint: Any, given: object, place: str) -> object:  # hint: a type, an alias or a union
    if isinstance(hint, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not types.NoneType)
    if is_dataclass(hint):
        return _read(typing.cast("type[Any]", hint), given, place)
    if get_origin(hint) is tuple:
        if not isinstance(given, list):
            raise ConfigError(f"{place} = {given!r} must be a list")
        return tuple(_value(get_args(hint)[0], each, f"{place}[{at}]") for at, each in enumerate(given))
    if get_origin(hint) is typing.Literal:
        if given not in get_args(hint):
            raise ConfigError(f"{place} = {given!r} must be one of {', '.join(map(repr, get_args(hint)))}")
        return given
    if hint is str:
        if not isinstance(given, str):
            raise ConfigError(f"{place} = {given!r} must be a string, in quotes")
        return given
    return _number(hint, given, place)


def _number(hint: type[int] | type[float], given: object, place: str) -> float:
    whole = isinstance(given, int) and not isinstance(given, bool)
    if not (whole or (hint is float and isinstance(given, float))):
        raise ConfigError(f"{place} = {given!r} must be a {'whole ' if hint is int else ''}number")
    assert isinstance(given, int | float), "checked"
    if not 0 <= given < math.inf:
        raise ConfigError(f"{place} = {given} must be finite and at least 0")
    if hint is int and given < 1 and not place.endswith((".rank", ".place")):
        raise ConfigError(f"{place} = {given} must be at least 1")
    return hint(given)


def _full(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
