"""Ranks as processes that begin within milliseconds, forked from one that has imported what they need.

`ranks_begin_by` says how those of `evenflow.launch` do: "spawn" is a user's way, "forkserver" forks them
from a server, "fork" from the caller. `python forked.py …` is `evenflow …` whose ranks are forked from it.
`run_ranks` is itself the launcher: as under torchrun, the store where ranks meet lives in none of them, and
torch is told where a rank's error goes.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig

from evenflow import launcher

_PRELOADED = [
    "torch",
    "torch.distributed",
    "evenflow.pipe.build",
    "evenflow.launcher",
    "pytest",
    "transformers.models.llama.modeling_llama",
]


@contextlib.contextmanager
def ranks_begin_by(start_method: str) -> Iterator[None]:
    """While this is entered `evenflow.launch` begins ranks so.

    By "spawn" each of them imports for three or four seconds; by "forkserver" they print where the server
    does.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with patch.object(launcher, "LaunchConfig", functools.partial(LaunchConfig, start_method=start_method)):
        yield


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, when (monotonic), what it wrote to stderr, its error for torch."""

    exit_code: int
    seconds: float
    printed: str
    error: str


def run_ranks(function: Callable, folder: Path, *args, num_ranks: int, within_seconds: float) -> list[Ended]:
    """Let each rank call `function(rank, folder, *args)`; who has not ended in time is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_rank, args=(function, rank, num_ranks, store.port, folder, args))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    ended = dict.fromkeys(range(num_ranks), 0.0)
    end = time.monotonic() + within_seconds
    while (alive := [rank for rank in ranks if rank.exitcode is None]) and time.monotonic() < end:
        wait([rank.sentinel for rank in alive], timeout=end - time.monotonic())
        for number, rank in enumerate(ranks):
            if rank.exitcode is not None and not ended[number]:
                ended[number] = time.monotonic()
    for rank in ranks:
        rank.kill()
        rank.join()
    return [_ended(folder, number, rank.exitcode, ended[number]) for number, rank in enumerate(ranks)]


def _ended(folder: Path, number: int, exit_code: int, seconds: float) -> Ended:
    error = folder / f"error{number}.json"
    told = json.loads(error.read_text())["message"]["message"] if error.exists() else ""
    return Ended(exit_code, seconds, (folder / f"stderr{number}").read_text(), told)


def _rank(function: Callable, rank: int, num_ranks: int, port: int, folder: Path, args: tuple) -> None:
    with (folder / f"stderr{rank}").open("w") as printed:
        os.dup2(printed.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": str(folder / f"error{rank}.json"),
    }
    function(rank, folder, *args)


if __name__ == "__main__":
    from evenflow.cli.main import main

    with ranks_begin_by("fork"):
        main(sys.argv[1:])
