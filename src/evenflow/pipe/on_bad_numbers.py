"""What a pipeline is told to do with bad numbers."""

from dataclasses import dataclass
from typing import Literal

from evenflow.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OnBadNumbers:
    """`policy` None does nothing about them; `watches`: whether each step is watched as it runs."""

    policy: Literal["stop", "skip"] | None = None
    watches: bool = False

    @staticmethod
    def of(bad_numbers: object, *, find_nan: object) -> "OnBadNumbers":
        """What these arguments of `pipeline` ask for; raises `ConfigError` for what is unknown.

        >>> OnBadNumbers.of(None, find_nan=True)
        OnBadNumbers(policy='stop', watches=True)
        """
        if not isinstance(find_nan, bool):
            raise ConfigError(f"find_nan={find_nan!r} must be True or False")
        match bad_numbers:
            case None:
                return OnBadNumbers("stop" if find_nan else None, find_nan)
            case "stop":
                return OnBadNumbers("stop", find_nan)
            case "skip":
                return OnBadNumbers("skip", find_nan)
            case _:
                raise ConfigError(f"bad_numbers={bad_numbers!r} is none of 'stop', 'skip' and None")
