"""The keys of a run's TOML: an unknown one is refused, with the known one that it may have meant."""

import difflib
from collections.abc import Mapping

from evenflow.errors import ConfigError
from evenflow.foreign import shown


def check_keys(content: Mapping[str, object], known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `ConfigError` for a key that is not `known`: those of each table, of the top level under ''."""
    for key, value in content.items():
        if key not in known[""]:
            raise _unknown_key(key, table="", known=known)
        if key == "name":
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key} = {shown(value)} must be a table: write [{key}] on a line of its own")
        for inner in value:
            if inner not in known[key]:
                raise _unknown_key(inner, table=key, known=known)


def _unknown_key(key: str, *, table: str, known: Mapping[str, tuple[str, ...]]) -> ConfigError:
    nearest = _nearest_key(key, table=table, known=known)
    hint = f"; did you mean {nearest!r}?" if nearest else "."
    place = f"[{table}]" if table else "The top level"
    return ConfigError(
        f"unknown key {shown(_full(table, key))}{hint} {place} takes: {', '.join(known[table])}"
    )


def _nearest_key(key: str, *, table: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
    """A known key that the unknown one may have meant: the same in another table, or one spelt much alike."""
    for other, keys in known.items():
        if key in keys:
            return _full(other, key)
    for other in (table, *known):
        for match in difflib.get_close_matches(key, known[other], n=1):
            return _full(other, match)
    return None


def _full(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key
