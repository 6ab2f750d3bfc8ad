"""Alternate: some forwards ahead, then a forward and a backward in turn, as 1F1B and all its kin do."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def alternate(forwards: Sequence[T], backwards: Sequence[U], num_warmup: int) -> list[T | U]:
    """Return `num_warmup` forwards, then before each backward one forward more, as long as there are any.

    So at most `num_warmup + 1` forwards are ahead of the backwards. There are as many of both.

    >>> alternate("FGH", "fgh", num_warmup=1)
    ['F', 'G', 'f', 'H', 'g', 'h']
    """
    queue: list[T | U] = [*forwards[:num_warmup]]
    for at, backward in enumerate(backwards):
        queue += [*forwards[at + num_warmup : at + num_warmup + 1], backward]
    return queue
