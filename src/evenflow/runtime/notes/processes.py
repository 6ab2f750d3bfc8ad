"""Processes and their host, as Linux tells of them: in which state one is, and who can reach whom.

Hosts are asked of the running system and its network, for two may have one name.
"""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

_STATES = {
    "T": "is stopped (SIGSTOP, or Ctrl-Z)",
    "t": "is stopped by a debugger",
    "Z": "has ended",
    "X": "has ended",
    "D": "waits inside the system, for a disk or a device",
    "R": "runs, but lets no Python thread run",
    "S": "sleeps, and lets no Python thread run",
}


@dataclass(frozen=True, slots=True)
class Process:
    """A process; `started` tells it from a later one of the same number."""

    pid: int
    parent: int
    started: int

    def state(self) -> str | None:
        """What it does, in words that follow on "its process"; None where the system does not say.

        >>> this_process().state() in ("runs, but lets no Python thread run", None)
        True
        """
        if not Path("/proc/self/stat").exists():
            return None
        found = _looked_up(self.pid)
        if found is None or found[1] != self:
            return _STATES["Z"]
        return _STATES.get(found[0])

    def end_sibling(self) -> None:
        """End it, if the launcher that started this process has started it too.

        A stopped process leaves no launcher's polite request unanswered: it does not hear it.
        """
        found = _looked_up(self.pid)
        if found is not None and found[1] == self and self.parent == os.getppid() and self.pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def this_host() -> str:
    """What ranks have in common that can reach each other's sockets: the running system, and its network.

    Containers of one machine have networks of their own: they count as several hosts. Where the system says
    neither (it is not Linux) the host's name must do.

    >>> this_host() == this_host()
    True
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def this_system() -> str:
    """What processes have in common that see each other under the same numbers: containers do not.

    >>> this_system() == this_system()
    True
    """
    with contextlib.suppress(OSError):
        return f"{this_host()} {Path('/proc/self/ns/pid').readlink()}"
    return this_host()


def this_process() -> Process:
    """This one."""
    found = _looked_up(os.getpid())
    return Process(os.getpid(), os.getppid(), 0) if found is None else found[1]


def _looked_up(pid: int) -> tuple[str, Process] | None:
    """A process's state, in Linux's letter, and what tells it from others; None where there is none."""
    try:
        # The name, in brackets, may hold anything; what follows is numbered from 3 (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], Process(pid, int(fields[1]), int(fields[19]))
