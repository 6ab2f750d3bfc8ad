"""A process that may hang: a rank measures its links in one, and replaces it where a link does not answer.

A transfer that hangs (on NCCL it is a kernel that waits for ever) cannot be stopped from inside its process.
The worker ends when its rank does, whatever it is doing.
"""

import contextlib
import multiprocessing
import os
import queue
import threading
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch hands them on

from evenflow.doctor.exchange import Exchange, exchange

_STARTING_SECONDS = 60.0  # to import torch on a busy machine


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a link could not be measured."""

    reason: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where two workers find each other: a store, and a name that no other meeting has."""

    host: str
    port: int
    name: str
    side: int


class Worker:
    """A process of its own that measures links of one device; a context manager that ends it."""

    def __init__(self, device: str, backend: str) -> None:
        self._device, self._backend = device, backend

    def __enter__(self) -> "Worker":
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def measure(self, meeting: Meeting, *, timeout_seconds: float) -> Exchange | Fault:
        """Meet another worker and measure the link; a process that does not answer is replaced."""
        try:
            self._pipe.send((meeting, timeout_seconds))
            answered = self._pipe.poll(timeout_seconds)
            result: Exchange | Fault = (
                self._pipe.recv() if answered else Fault(f"no answer within {timeout_seconds:g} s")
            )
        except (EOFError, OSError):
            answered, result = False, Fault("the process that measured it ended")
        if not answered:
            self._end()
            self._start()
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._device, self._backend), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_STARTING_SECONDS):
            self._end()
            raise TimeoutError(f"a process to measure with did not start within {_STARTING_SECONDS:g} s")
        with contextlib.suppress(EOFError):
            self._pipe.recv()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, device_name: str, backend: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    commands: queue.SimpleQueue[tuple[Meeting, float]] = queue.SimpleQueue()

    def listen() -> None:
        """Take commands, and end the process with its rank though the main thread may hang."""
        while True:
            try:
                commands.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(0)

    pipe.send("ready")
    threading.Thread(target=listen, daemon=True).start()
    while True:
        meeting, timeout_seconds = commands.get()
        pipe.send(_met(meeting, timeout_seconds, device, backend))


def _met(meeting: Meeting, timeout_seconds: float, device: torch.device, backend: str) -> Exchange | Fault:
    timeout = timedelta(seconds=timeout_seconds)
    try:
        store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
        dist.init_process_group(
            backend,
            store=PrefixStore(meeting.name, store),
            rank=meeting.side,
            world_size=2,
            timeout=timeout,
        )
        found = exchange(meeting.side, device)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what there is to say of this link)
        return Fault(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return found
