"""Which host a process runs on, as its system and its network say: two hosts may have one name."""

import socket
from pathlib import Path


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
