"""Hosts on one machine: Linux namespaces, which a wire of a given speed and delay joins.

Each host has a network, a name, processes, shared memory and (if asked for) an identity of its own, and sees
the machine's files. All of it hangs on one process a host, which the kernel ends together with whatever runs
in its namespaces: nothing has a name in the file system, and nothing is left when this process ends, however
it does.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DEVICE = "wire0"
_TOOLS = ("unshare", "nsenter", "setpriv", "ip")
_SET_UP = """
set -e
mount -t tmpfs none /dev/shm
printf '{names}' > /dev/shm/.hosts && mount --bind /dev/shm/.hosts /etc/hosts
{identity}
hostname {name}
ip link set lo up
sysctl -q -w net.ipv4.tcp_congestion_control=cubic || true
echo ready
exec sleep infinity
"""
_IDENTITY = (
    "echo {identity} > /dev/shm/.boot && mount --bind /dev/shm/.boot /proc/sys/kernel/random/boot_id\n"
)


@dataclass(frozen=True, slots=True)
class Host:
    """A host that runs: the process that holds its namespaces, and the address that others reach it by."""

    name: str
    process: int
    address: str

    def start(
        self, command: Sequence[str], env: Mapping[str, str], **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a command on it, in this process's folder; `options` are those of `subprocess.Popen`."""
        spaces = ("--net", "--uts", "--ipc", "--mount", "--pid")
        enter = ("nsenter", "--target", str(self.process), *spaces, f"--wd={Path.cwd()}", "--")
        return subprocess.Popen([*enter, *command], env=dict(env), text=True, **options)


def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"namespaces need {' and '.join(missing)}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "the wire between namespaces needs /dev/net/tun"
    try:
        with hosts(["host"]):
            return None
    except (OSError, RuntimeError) as error:
        return f"namespaces cannot be made here: {error}"


@contextmanager
def hosts(
    names: Sequence[str],
    *,
    bytes_per_second: float = 1e9 / 8,
    delay_seconds: float = 2e-3,
    own_identity: bool = True,
) -> Iterator[tuple[Host, ...]]:
    """So many hosts of these names (they may be alike), for as long as the context lasts.

    With `own_identity` each was booted by itself, as machines are; else they are containers of this one.
    Raises `RuntimeError` where the system does not let them be made.
    """
    with ExitStack() as stack:
        made = []
        for number, name in enumerate(names):
            others = {other: _address(at) for at, other in enumerate(names) if other != name}
            process = stack.enter_context(_namespaces(name, others, own_identity=own_identity))
            made.append(Host(name, process, _address(number)))
        stack.enter_context(_wire(made, bytes_per_second, delay_seconds))
        for host in made:
            _run(host, "ip", "address", "add", f"{host.address}/24", "dev", _DEVICE)
            _run(host, "ip", "link", "set", _DEVICE, "up")
        yield tuple(made)


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


@contextmanager
def _namespaces(name: str, others: Mapping[str, str], *, own_identity: bool) -> Iterator[int]:
    # As in Debian: a host's own name is an address at which no other host reaches it.
    known = {"localhost": "127.0.0.1", name: "127.0.1.1", **others}
    names = "".join(f"{address} {each}\\n" for each, address in known.items())
    identity = _IDENTITY.format(identity=uuid.uuid4()) if own_identity else ""
    script = _SET_UP.format(name=name, names=names, identity=identity)
    spaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child")
    with _ended(["unshare", *spaces, "sh", "-c", script]) as outside:
        _wait_ready(outside)
        (inside,) = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        yield int(inside)


@contextmanager
def _wire(made: Sequence[Host], bytes_per_second: float, delay_seconds: float) -> Iterator[None]:
    shape = (f"--bytes-per-second={bytes_per_second}", f"--delay-seconds={delay_seconds}")
    ends = [f"{host.process}={host.address}" for host in made]
    program = str(Path(__file__).with_name("wire.py"))
    with _ended([sys.executable, program, *shape, "--device", _DEVICE, *ends]) as process:
        _wait_ready(process)
        yield


@contextmanager
def _ended(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the context, or with this process."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None, "it is a pipe"
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(process.communicate()[1].strip() or "it ended without a word")


def _run(host: Host, *command: str) -> None:
    with host.start(command, os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.strip()}")
