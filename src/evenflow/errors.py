"""The exceptions that Evenflow raises: one class per cause.

A message says what is wrong (with the value and the limit), where, and how to mend it. Faults of
Evenflow itself are `AssertionError`s and never classes of this file.
"""

from collections.abc import Sequence

_MAX_FAULTS = 20  # one mistake can have thousands of consequences; a longer report is no longer read


def listed(faults: Sequence[str]) -> list[str]:
    """Return the lines of a message that tell faults, a line for each; of very many the first few.

    >>> listed(["0F0 is missing"])
    ['  - 0F0 is missing']
    """
    lines = [f"  - {fault}" for fault in faults[:_MAX_FAULTS]]
    return lines if len(faults) <= _MAX_FAULTS else [*lines, f"  and {len(faults) - _MAX_FAULTS} more"]


class EvenflowError(Exception):
    """Base of everything that Evenflow raises on purpose."""


class ConfigError(EvenflowError, ValueError):
    """An argument, a configuration file or a batch that cannot work as given: the caller's to mend."""


class MissingPackageError(ConfigError, ImportError):
    """A package that was not installed along, because only a part of Evenflow needs it."""


class ScheduleError(EvenflowError, ValueError):
    """A schedule or program that must not run; the message lists all of its faults."""


class RecordError(EvenflowError):
    """The model did something during recording that a split could not repeat faithfully."""


class OutOfMemoryError(EvenflowError, MemoryError):
    """A rank's memory was too small for a step; the message reports what was there and what would help."""


class BadNumbersError(EvenflowError, ArithmeticError):
    """A step made NaNs or infinities, and nothing was updated; the message says where they began."""


class PeerError(EvenflowError, RuntimeError):
    """Another rank failed, vanished or did not answer in time: the peer's fault, not the caller's."""
