"""A run's configuration as TOML: the inverse of `config.read_config`, with paths that hold anywhere."""

import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from evenflow.cli.config import STDOUT, FolderModel, FunctionModel, ModelChoice, RunConfig, TextData


def write_config(config: RunConfig) -> str:
    """Return the text of a configuration; reading it gives the same run, from whatever folder.

    >>> print(write_config(RunConfig("mine", FunctionModel("my_module:build"), TextData())).splitlines()[0])
    name = "mine"
    """
    tables = {"model": _model(config.model), "training": _keys(config.training)}
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


def _model(model: ModelChoice) -> dict[str, object]:
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
