"""A table of a TOML file, read strictly: every key known, every value of its type and in its range."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

from evenflow.cluster.names import nearest
from evenflow.cluster.sizes import parse_bytes
from evenflow.errors import ConfigError
from evenflow.foreign import shown

_LARGEST = 1e100  # sums and products of such numbers are still finite


class Table:
    """One table and its `place` in the file, for messages. Raises `ConfigError` for a key not in `known`.

    >>> Table({"cuont": 2}, "hosts[0]", ("count", "devices"))
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: unknown key 'hosts[0].cuont'; did you mean 'count'? There are: count, devices
    """

    def __init__(self, content: object, place: str, known: Sequence[str]) -> None:
        if not isinstance(content, dict):
            raise ConfigError(
                f"{place} = {shown(content)} must be a table: key = value, in braces or below [{place}]"
            )
        self._content: Mapping[str, object] = content
        self._place = place
        for key in content:
            if key not in known:
                raise ConfigError(f"unknown key {shown(self.where(key))}{nearest(key, known)}")

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def where(self, key: str) -> str:
        """The full name of a key, for a message."""
        return f"{self._place}.{key}" if self._place else key

    def text(self, key: str) -> str:
        """The string under a key that must be there."""
        value = self._given(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where(key)} = {shown(value)} must be a string, in quotes")
        if not value.isprintable():
            raise ConfigError(f"{self.where(key)} = {shown(value)} must hold no control characters")
        return value

    def whole(self, key: str, *, least: int, most: int) -> int:
        """The whole number under a key that must be there."""
        value = self._given(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.where(key)} = {shown(value)} must be a whole number")
        if not least <= value <= most:
            raise ConfigError(
                f"{self.where(key)} = {shown(value)} must be at least {least} and at most {most}"
            )
        return value

    def number(self, key: str, *, power: int = 0, above_zero: bool = False) -> float:
        """The number of at least 0, or above it, under a key that must be there, times 10 to the `power`.

        >>> Table({"latency_us": 12.5}, "links.own", ("latency_us",)).number("latency_us", power=-6)
        1.25e-05
        """
        value = self._given(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{self.where(key)} = {shown(value)} must be a number")
        if not value >= 0 or (above_zero and value == 0):
            raise ConfigError(
                f"{self.where(key)} = {shown(value)} must be {'above' if above_zero else 'at least'} 0"
            )
        if _LARGEST < value < math.inf:
            raise ConfigError(f"{self.where(key)} = {shown(value)} must be at most {_LARGEST:g}")
        # Decimal, so that what was written as 12.5 millionths is read as the nearest number to that.
        return float(Decimal(str(value)).scaleb(power)) if value < math.inf else math.inf

    def size(self, key: str) -> float:
        """The bytes under a key that must be there, written with a unit."""
        text = self.text(key)
        try:
            return parse_bytes(text)
        except ConfigError as error:
            raise ConfigError(f"{self.where(key)}: {error}") from None

    def table(self, key: str, known: Sequence[str]) -> "Table":
        """The table under a key; an empty one where there is none."""
        return Table(self._content.get(key, {}), self.where(key), known)

    def tables(self, key: str, known: Sequence[str]) -> "list[Table]":
        """The list of tables under a key; an empty one where there is none."""
        value = self._content.get(key, [])
        if not isinstance(value, list):
            raise ConfigError(f"{self.where(key)} = {shown(value)} must be a list of tables")
        return [Table(each, f"{self.where(key)}[{number}]", known) for number, each in enumerate(value)]

    def named_tables(self, key: str, known: Sequence[str]) -> "dict[str, Table]":
        """The tables under a key, by names of the user's own."""
        value = self._content.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(
                f"{self.where(key)} = {shown(value)} must hold tables: write [{self.where(key)}.NAME]"
            )
        for name in value:
            if not name.isprintable():
                raise ConfigError(f"the name {shown(name)} under {self.where(key)} has control characters")
        return {name: Table(each, f"{self.where(key)}.{name}", known) for name, each in value.items()}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are there."""
        return tuple(self._content)

    def _given(self, key: str) -> object:
        if key not in self._content:
            raise ConfigError(f"{self.where(key)} is missing")
        return self._content[key]
