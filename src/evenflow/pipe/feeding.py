"""Feeding: batches that the first rank alone reads, for `step`, which sends others their share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evenflow.errors import PeerError
from evenflow.pipe.agree import FED
from evenflow.runtime.world import World


def fed(
    world: World, loader: Iterable[Any], begin: Callable[[Iterable[Any]], Iterator[Any]]
) -> Iterator[Any]:
    """Yield the batches that `begin` makes of the loader on the first rank, elsewhere what stands for them.

    A collective call.

    Raises what the loader does, and `PeerError` on the other ranks.
    """
    if world.size == 1:
        yield from begin(loader)
        return
    iterator: Iterator[Any] | None = None
    while True:
        batch, state = FED, "batch"
        if world.is_first:
            try:
                iterator = begin(loader) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                state = "end"
            except Exception as error:
                world.share(f"{type(error).__name__}: {error}", source=0)
                raise
        state = world.share(state, source=0)
        if state == "end":
            return
        if state != "batch":
            raise PeerError(f"rank 0's loader failed: {state}")
        yield batch
