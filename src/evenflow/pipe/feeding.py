"""Feeding: batches that the first rank alone reads, for `step`, which sends others their share."""

from collections.abc import Iterable, Iterator
from typing import Any

from evenflow.errors import PeerError
from evenflow.pipe.agree import FED
from evenflow.runtime.world import World


def fed(world: World, loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the loader's batches on the first rank, and on others what stands for them; collective.

    Raises what the loader does, and `PeerError` on the other ranks.
    """
    if world.size == 1:
        yield from loader
        return
    iterator = iter(loader) if world.is_first else None
    while True:
        batch, state = FED, "batch"
        if iterator is not None:
            try:
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
