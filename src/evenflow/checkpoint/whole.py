"""A folder that is written under another name and appears when it is whole."""

import fnmatch
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from evenflow.errors import ConfigError, PeerError
from evenflow.runtime.ranks.world import World

_SEEN_SECONDS = 10.0  # by then a network's file system shows on one host what another has made


def in_the_way(folder: Path, kinds: Collection[str], other: str) -> str | None:
    """Why `folder` may not be replaced: it holds `other`, in words, than these kinds; None where it may."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "it is a file"
    held = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    foreign = [name for name in held if not any(fnmatch.fnmatch(name, kind) for kind in kinds)]
    return f"the folder exists and holds {other} ({', '.join(foreign[:5])})" if foreign else None


@contextmanager
def appearing(folder: Path, world: World, *, all_write: bool = True) -> Iterator[Path]:
    """Yield an empty folder for every rank to write into, which then takes the place of `folder`; collective.

    Where a rank fails, nothing appears: it raises its own error, and the others `PeerError`. There must be no
    collective call in between that a failing rank would leave out. Raises `ConfigError` where it is another
    folder for some ranks than for the first, unless that writes alone.
    """
    folder = folder.resolve()  # what a link points to is replaced, and not the link
    partial = folder.with_name(folder.name + ".partial")
    mark = partial / world.share(f".{uuid.uuid4().hex}", 0)
    _attempt(world, folder, lambda: _make(mark))
    _check_shared(folder, mark, world, all_write=all_write)
    failure: Exception | None = None
    try:
        yield partial
    except Exception as error:  # noqa: BLE001 (raised below, after the others have heard of it)
        failure = error
    told = world.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    failed = [f"rank {rank} failed to write {folder}: {what}" for rank, what in enumerate(told) if what]
    if failed and world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if failure is not None:
        raise failure
    if failed:
        raise PeerError(failed[0])
    _attempt(world, folder, lambda: _take_place(partial, folder))  # nobody goes on before it is there


def _attempt(world: World, folder: Path, act: Callable[[], None]) -> None:
    """Let the first rank do it; where it can't, all ranks raise."""
    failure: OSError | None = None
    if world.rank == 0:
        try:
            act()
        except OSError as error:
            failure = error
    told = world.share(None if failure is None else str(failure), 0)
    if failure is not None:
        raise failure
    if told is not None:
        raise PeerError(f"rank 0 failed to write {folder}: {told}")


def _make(mark: Path) -> None:
    """An empty folder, but for a file."""
    shutil.rmtree(mark.parent, ignore_errors=True)
    mark.parent.mkdir(parents=True)
    mark.touch()


def _take_place(partial: Path, folder: Path) -> None:
    """Whenever this is cut short, the old folder or the new one is whole, under one name or another."""
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_shared(folder: Path, mark: Path, world: World, *, all_write: bool) -> None:
    """Refuse a folder that ranks on other hosts would look for in vain."""
    seen = world.gather(not all_write or _comes(mark))
    if world.rank == 0:
        mark.unlink()
    if all(seen):
        return
    if world.rank == 0:
        shutil.rmtree(mark.parent, ignore_errors=True)
    ranks = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
    raise ConfigError(
        f"{folder} is not one folder for all ranks: what rank 0 writes there does not appear on the hosts of "
        f"ranks {ranks}; name a folder on a file system that all hosts share"
    )


def _comes(path: Path) -> bool:
    end = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def flush(path: Path) -> None:
    """See that a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
