"""Python that has imported torch already: `[*python(), "-m", "evenflow", …]` begins within milliseconds.

A server imports what programs need, and forks for each of them. The process that a test starts waits in the
program's stead: its arguments, files, folder, environment and exit code are the program's, but not its id,
nor the signals that it gets, and what it holds in memory is the server's too.

    python preloaded.py --serve SOCKET MODULE…   the server; it ends with its standard input
    python preloaded.py SOCKET ARGUMENT…         what stands for `python ARGUMENT…`
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from namespaces import Host

_TO_TRAIN = ("evenflow.pipe.build", "evenflow.launcher")
_FOR_COMMANDS = (
    "evenflow.cli.training",
    "evenflow.plan.planner",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
)
_COMMANDS = {
    "python": "",
    "python3": "",
    "evenflow": "-m evenflow",
    "torchrun": "-m torch.distributed.run",
}


def python() -> tuple[str, ...]:
    """The command that stands for `python`; the server behind it lives as long as this process."""
    return _stands_for_python(folder_of_commands())


@cache
def folder_of_commands() -> Path:
    """A folder for `PATH`, whose `python`, `evenflow` and `torchrun` begin so."""
    lasting = contextlib.ExitStack()
    atexit.register(lasting.close)
    return lasting.enter_context(_served(subprocess.Popen, (*_TO_TRAIN, *_FOR_COMMANDS)))


@contextlib.contextmanager
def python_on(hosts: Sequence["Host"]) -> Iterator[list[tuple[str, ...]]]:
    """The command that stands for `python` on each host, which has a server of its own."""
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(_served(host.start, _TO_TRAIN)) for host in hosts]
        yield [_stands_for_python(folder) for folder in folders]


@contextlib.contextmanager
def _served(start: Callable[..., subprocess.Popen], modules: Sequence[str]) -> Iterator[Path]:
    """The folder of commands, and a server that `start` starts: programs wait until it has imported."""
    with tempfile.TemporaryDirectory(prefix="evenflow_python_") as made:
        folder = Path(made)
        for name, arguments in _COMMANDS.items():
            command = f'exec {" ".join(_stands_for_python(folder))} {arguments} "$@"'
            (folder / name).write_text(f"#!/bin/sh\n{command}\n")
            (folder / name).chmod(0o755)
        server = start(
            [sys.executable, __file__, "--serve", str(folder / "socket"), *modules],
            env=os.environ | {"PYTHON_EXEC": str(folder / "python")},  # torchrun's name for what begins ranks
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert server.stdout.readline().strip() in ("ready", b"ready")
        try:
            yield folder
        finally:
            server.communicate()


def _stands_for_python(folder: Path) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", __file__, str(folder / "socket"))


# -- in the program's stead


def _wait_for_it(address: str, arguments: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        told = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(told).encode() + b"\n")
        ended = int(server.makefile().readline() or 1)
    if ended < 0:
        if -ended != signal.SIGKILL:
            signal.signal(-ended, signal.SIG_DFL)
        os.kill(os.getpid(), -ended)
    os._exit(ended)


# -- the server


def _next_program(address: str, modules: Sequence[str]) -> tuple[dict, list[int]]:
    """Import, then fork for whoever asks: returns in the program's process, and never in the server's."""
    import gc
    import importlib

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")  # who asks from now on waits
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # programs share what is there, until they write to it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who watches a program
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        told = json.loads(client.makefile().readline())
        program = os.fork()
        if not program:
            client.close()
            return told, files
        for file in files:
            os.close(file)
        _watch(program, client)
    os._exit(0)


def _watch(program: int, client: socket.socket) -> None:
    """Wait for the program's end, and tell; end it with all that it started once nobody waits for it."""
    ended = os.pidfd_open(program)
    if ended not in select.select([ended, client], [], [])[0]:
        os.killpg(program, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        client.sendall(f"{code}\n".encode())
    finally:
        os._exit(0)


# -- the program


def _become(told: dict, files: list[int]) -> None:
    """Take over files, environment and folder, and run what the arguments say."""
    import random

    import numpy as np

    from forked import ranks_begin_by

    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # The server has printed nothing and read nothing: its streams are new ones, but for how they hold lines.
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=told["arguments"][0] == "-u")
    environment = told["environment"] | {"PYTHON_EXEC": os.environ["PYTHON_EXEC"]}
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(told["folder"])
    random.seed()
    np.random.seed()
    with ranks_begin_by("fork"):
        _run(told["arguments"], told["folder"])


def _run(arguments: list[str], folder: str) -> None:
    """Run what a command line of `python` says."""
    import runpy

    match [each for each in arguments if each != "-u"]:
        case ["-m", module, *rest]:
            sys.path[0], sys.argv = folder, [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.path[0], sys.argv = folder, ["-c", *rest]
            exec(code, {"__name__": "__main__"})
        case [script, *rest]:
            sys.path[0], sys.argv = str(Path(script).resolve().parent), [script, *rest]
            runpy.run_path(script, run_name="__main__")


def _ended(program: tuple[dict, list[int]]) -> int:
    """Run to the end, as Python does, but for taking modules apart; the exit code."""
    import threading
    import traceback

    code: object = None
    try:
        _become(*program)
    except SystemExit as exited:
        code = exited.code
    except BaseException:  # noqa: BLE001 (it is the program's end)
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        os._exit(_ended(_next_program(sys.argv[2], sys.argv[3:])))
    else:
        _wait_for_it(sys.argv[1], sys.argv[2:])
