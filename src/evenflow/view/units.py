"""Units: seconds, bytes and numbers of things as a person reads them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit by its name, and how many of the base unit (seconds, bytes) it is."""

    name: str
    size: float


_TIMES = (Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
_SIZES = (Unit("TiB", 2.0**40), Unit("GiB", 2.0**30), Unit("MiB", 2.0**20), Unit("KiB", 2.0**10))
_BYTE = Unit("B", 1.0)


def time_unit(seconds: float) -> Unit:
    """Return the largest unit of time in which `seconds` are at least 1.

    >>> time_unit(0.25).name, time_unit(3.0).name
    ('ms', 's')
    """
    return next((unit for unit in _TIMES if seconds >= unit.size), _TIMES[-1] if seconds > 0 else _TIMES[0])


def byte_unit(num_bytes: float) -> Unit:
    """Return the largest unit of memory in which `num_bytes` are at least 1.

    >>> byte_unit(3 * 2**20).name
    'MiB'
    """
    return next((unit for unit in _SIZES if num_bytes >= unit.size), _BYTE)


def format_seconds(seconds: float) -> str:
    """Return a time in its own best unit.

    >>> format_seconds(98.4), format_seconds(0.0125), format_seconds(0)
    ('98.40 s', '12.50 ms', '0.00 s')
    """
    unit = time_unit(seconds)
    return f"{seconds / unit.size:.2f} {unit.name}"


def format_bytes(num_bytes: float) -> str:
    """Return a size in its own best unit.

    >>> format_bytes(1536)
    '1.50 KiB'
    """
    unit = byte_unit(num_bytes)
    return f"{num_bytes / unit.size:.{0 if unit is _BYTE else 2}f} {unit.name}"


def format_count(number: int, noun: str, plural: str = "s") -> str:
    """Return a number of things, `plural` being what the noun then ends in.

    >>> format_count(1, "stage"), format_count(1200, "microbatch", "es")
    ('1 stage', '1,200 microbatches')
    """
    return f"{number:,} {noun}{'' if number == 1 else plural}"
