"""Ranks as processes that begin within milliseconds, under a launcher that is this process.

They are forked from a server that has imported torch. As under torchrun, the store where they meet lives in
none of them, and torch is told where a rank's error goes.
"""

import json
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed import TCPStore

_PRELOADED = ["torch", "torch.distributed", "transformers", "evenflow.pipe.build", "evenflow.launcher"]
_MOST_SECONDS = 170  # less than pytest gives a test


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, when (monotonic), what it wrote to stderr, its error for torch."""

    exit_code: int
    seconds: float
    printed: str
    error: str


def launched(function: Callable, *args, nproc: int) -> list[Any]:
    """What `evenflow.launch` would return, sooner; fails with what a rank printed where one fails."""
    with tempfile.TemporaryDirectory(prefix="forked_") as place:
        folder = Path(place)
        ended = run_ranks(_answer, folder, function, args, num_ranks=nproc, within_seconds=_MOST_SECONDS)
        failed = [each for each in ended if each.exit_code != 0]
        first = min(failed, key=lambda each: each.seconds or math.inf, default=None)
        assert first is None, f"rank {ended.index(first)} ended with {first.exit_code}:\n{first.printed}"
        return [pickle.loads((folder / f"answer{rank}").read_bytes()) for rank in range(nproc)]


def _answer(rank: int, folder: Path, function: Callable, args: tuple) -> None:
    (folder / f"answer{rank}").write_bytes(pickle.dumps(function(*args)))
    if dist.is_initialized():
        dist.destroy_process_group()


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
