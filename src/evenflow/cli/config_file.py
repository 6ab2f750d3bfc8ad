"""A run's configuration as a file of TOML: read, with every key and type checked, and written.

What is written is read as the same run, from whatever folder.
"""

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from evenflow.cli.config import (
    STDOUT,
    DataChoice,
    ExampleData,
    FolderModel,
    FunctionModel,
    Logging,
    ModelChoice,
    Pipelining,
    RunConfig,
    Saving,
    TextData,
    Training,
)
from evenflow.errors import ConfigError
from evenflow.foreign import is_file_name, read_toml, shown

_SECTIONS = {
    "data": TextData,
    "training": Training,
    "pipeline": Pipelining,
    "checkpoints": Saving,
    "logs": Logging,
}
# Of each table of the TOML; the top level's under "".
_KNOWN_KEYS = {
    "": ("name", "model", *_SECTIONS),
    "model": ("function", "arguments", "folder"),
    **{name: tuple(each.name for each in fields(kind)) for name, kind in _SECTIONS.items()},
}


def read_config(path: Path) -> RunConfig:
    """Read a run from a TOML file. Paths inside it count from the file's own folder.

    Raises:
        ConfigError: The file cannot be read or is no TOML; a key is unknown (the nearest known one is
            suggested), has the wrong type or lies out of its range; the model is missing.

    Example:
        >>> read_config(Path("examples/train_gpt.toml")).name  # doctest: +SKIP
        'train_gpt'
    """
    content = read_toml(path, "configuration")
    try:
        _check_keys(content)
        return RunConfig(
            name=_name(content.get("name", path.stem)),
            model=_model(content.get("model"), path.parent),
            data=_data(content.get("data"), path.parent),
            training=_section(Training, content.get("training", {}), "training"),
            pipeline=_section(Pipelining, content.get("pipeline", {}), "pipeline"),
            checkpoints=_section(Saving, content.get("checkpoints", {}), "checkpoints"),
            logs=_logs(content.get("logs", {}), path.parent),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _name(value: object) -> str:
    name = _convert(value, str, "name")
    assert isinstance(name, str), "converted"
    if not is_file_name(name):
        raise ConfigError(
            f"name = {shown(name)} names a folder under runs/, so it cannot be empty, or '..', or hold a "
            "slash or control characters"
        )
    return name


def _model(table: object, folder: Path) -> ModelChoice:
    match table:
        case {"function": str(reference), **rest} if "folder" not in rest:
            arguments = rest.get("arguments", {})
            if not isinstance(arguments, dict):
                raise ConfigError(
                    f"model.arguments = {shown(arguments)} must be a table of the function's arguments"
                )
            return FunctionModel(_from_folder(reference, folder), arguments)
        case {"folder": str(path), **rest} if not rest:
            return FolderModel(folder / path)
        case _:
            raise ConfigError(
                '[model] must say which model to train: either function = "FILE.py:FUNCTION" (or '
                '"MODULE:FUNCTION"), with its arguments if it takes any, or folder = "a Hugging Face folder"'
            )


def _from_folder(reference: str, folder: Path) -> str:
    """A `FILE.py:FUNCTION` of a configuration file counts from that file's folder."""
    place, colon, function = reference.rpartition(":")
    return f"{folder / place}{colon}{function}" if place.endswith(".py") else reference


def _data(table: object, folder: Path) -> DataChoice:
    if table is None:
        return ExampleData()
    data = _section(TextData, table, "data")
    return replace(data, paths=tuple(folder / path for path in data.paths))


def _logs(table: object, folder: Path) -> Logging:
    said = _section(Logging, table, "logs")
    return said if said.json in (None, STDOUT) else replace(said, json=folder / said.json)


S = TypeVar("S")
_LARGEST_WHOLE = 2**63 - 1


def _section(kind: type[S], table: object, place: str) -> S:
    """Build one of the dataclasses from its table, whose keys have been checked."""
    assert isinstance(table, dict), "checked with the keys"
    hints = typing.get_type_hints(kind)
    return kind(**{key: _convert(value, hints[key], f"{place}.{key}") for key, value in table.items()})


# The hint is a type, a union or a generic alias: `Any`, because Python has no common type for these.
def _convert(value: object, hint: Any, place: str) -> object:
    """The TOML value as the field's type; the reason where it cannot be."""
    if isinstance(hint, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        fitting = [option for option in options if (get_origin(option) is tuple) == isinstance(value, list)]
        hint = (fitting or options)[0]
    if get_origin(hint) is Literal:
        hint = str  # the dataclass says which
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        if not isinstance(value, list):
            raise ConfigError(f"{place} = {shown(value)} must be a list, in square brackets")
        return tuple(_convert(each, element, place) for each in value)
    # In Python a bool is an int; in a configuration it is a mistake.
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        raise ConfigError(f"{place} = {shown(value)} must lie between -{_LARGEST_WHOLE} and {_LARGEST_WHOLE}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    names = {int: "a whole number", float: "a number", str: "a string", Path: "a path", bool: "true or false"}
    raise ConfigError(f"{place} = {shown(value)} must be {names[hint]}")


def _check_keys(content: Mapping[str, object]) -> None:
    """Refuse an unknown key, with the known one that it may have meant."""
    for key, value in content.items():
        if key not in _KNOWN_KEYS[""]:
            raise _unknown_key(key, table="")
        if key == "name":
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key} = {shown(value)} must be a table: write [{key}] on a line of its own")
        for inner in value:
            if inner not in _KNOWN_KEYS[key]:
                raise _unknown_key(inner, table=key)


def _unknown_key(key: str, *, table: str) -> ConfigError:
    nearest = _nearest_key(key, table=table)
    hint = f"; did you mean {nearest!r}?" if nearest else "."
    place = f"[{table}]" if table else "The top level"
    return ConfigError(
        f"unknown key {shown(_full(table, key))}{hint} {place} takes: {', '.join(_KNOWN_KEYS[table])}"
    )


def _nearest_key(key: str, *, table: str) -> str | None:
    """A known key that the unknown one may have meant: the same in another table, or one spelt much alike."""
    for other, keys in _KNOWN_KEYS.items():
        if key in keys:
            return _full(other, key)
    for other in (table, *_KNOWN_KEYS):
        for match in difflib.get_close_matches(key, _KNOWN_KEYS[other], n=1):
            return _full(other, match)
    return None


def _full(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def write_config(config: RunConfig) -> str:
    """Return the text of a configuration; reading it gives the same run, from whatever folder.

    >>> print(write_config(RunConfig("mine", FunctionModel("my_module:build"), TextData())).splitlines()[0])
    name = "mine"
    """
    tables = {"model": _model_table(config.model), "training": _keys(config.training)}
    tables["pipeline"] = _keys(config.pipeline)
    tables["checkpoints"] = _keys(config.checkpoints)
    tables["logs"] = _keys(config.logs)
    if config.logs.json not in (None, STDOUT):
        tables["logs"]["json"] = config.logs.json.resolve()
    if isinstance(config.data, TextData):
        paths = [path.resolve() for path in config.data.paths]
        tables["data"] = _keys(config.data) | ({"paths": paths} if paths else {})
    lines = [f"name = {_written(config.name)}"]
    for name, keys in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_written(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _model_table(model: ModelChoice) -> dict[str, object]:
    match model:
        case FolderModel(folder):
            return {"folder": folder.resolve()}
        case FunctionModel(reference, arguments):
            place, colon, function = reference.rpartition(":")
            where = str(Path(place).resolve()) if place.endswith(".py") else place
            return {"function": f"{where}{colon}{function}"} | ({"arguments": arguments} if arguments else {})


def _keys(section: Any) -> dict[str, object]:  # section: a dataclass
    """What stands in it, without what was left open: TOML has no word for None."""
    values = ((field.name, getattr(section, field.name)) for field in fields(section))
    return {name: value for name, value in values if value not in (None, ())}


def _written(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() | Path():
            # TOML's strings are JSON's, but for half pairs (which JSON makes of rare signs) and DEL.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case int() | float():
            return repr(value)
        case datetime() | date() | time():
            return value.isoformat()
        case Mapping():
            return f"{{ {', '.join(f'{_written(key)} = {_written(each)}' for key, each in value.items())} }}"
        case list() | tuple():
            return f"[{', '.join(map(_written, value))}]"
        case _:
            raise AssertionError(f"{value!r} did not come from TOML")
