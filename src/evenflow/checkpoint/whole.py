"""A folder that is written under another name and appears when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenflow.errors import PeerError
from evenflow.runtime.world import World


@contextmanager
def appearing(folder: Path, world: World) -> Iterator[Path]:
    """Yield an empty folder for every rank to write into, which then takes the place of `folder`; collective.

    Where a rank fails, nothing appears: it raises its own error, and the others `PeerError`. There must be no
    collective call in between that a failing rank would leave out.
    """
    folder = folder.resolve()  # what a link points to is replaced, and not the link
    partial = folder.with_name(folder.name + ".partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.gather(None)  # nobody writes before the old remains are gone
    failure: Exception | None = None
    try:
        yield partial
    except Exception as error:  # noqa: BLE001 (raised below, after the others have heard of it)
        failure = error
    told = world.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    failed = [f"rank {rank} failed to write {folder}: {what}" for rank, what in enumerate(told) if what]
    if world.rank == 0:
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    world.gather(None)  # nobody goes on before the folder is there
    if failure is not None:
        raise failure
    if failed:
        raise PeerError(failed[0])
