"""Sizes of memory as a person writes them: 24GiB, 80 GB, 512MiB."""

import re
from decimal import Decimal

from evenflow.errors import ConfigError

_UNITS: dict[str, int] = {
    **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", start=1)},
    "B": 1,
}
_BY_LOWER = {unit.lower(): size for unit, size in _UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> float:
    """Return the bytes of a size with a unit; `ConfigError` for what is none.

    KiB, MiB, GiB and TiB are powers of 1024, KB, MB, GB and TB of 1000. Upper and lower case are alike.

    >>> parse_bytes("24GiB"), parse_bytes("1.5 kb")
    (25769803776.0, 1500.0)
    """
    match = _SIZE.fullmatch(text)
    unit = _BY_LOWER.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is no size: write a number and one of {', '.join(_UNITS)}, as in 24GiB")
    return float(match[1]) * unit


def write_bytes(num_bytes: float) -> str:
    """Return a size that `parse_bytes` reads as the very same number, in the largest unit that is whole.

    >>> write_bytes(24 * 2**30), write_bytes(2**20 + 1)
    ('24GiB', '1048577B')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes and num_bytes % _UNITS[unit] == 0:
            return f"{int(num_bytes) // _UNITS[unit]}{unit}"
    return f"{Decimal(str(num_bytes)).normalize():f}B"


def told_bytes(num_bytes: float) -> str:
    """Return a size as a person reads it, with one decimal, in the largest unit in which it is at least 1.

    Below 10 TiB, GiB do: sizes that are to be compared then stand in one unit.

    >>> told_bytes(24 * 2**30), told_bytes(1.5 * 2**40), told_bytes(1536), told_bytes(0)
    ('24.0 GiB', '1,536.0 GiB', '1.5 KiB', '0 B')
    """
    for unit, least in (("TiB", 10), ("GiB", 1), ("MiB", 1), ("KiB", 1)):
        if num_bytes >= least * _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:,.1f} {unit}"
    return f"{num_bytes:.0f} B"
