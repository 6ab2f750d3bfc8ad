"""What this process holds of the host's memory, as the kernel counts it: Python and torch included."""

import contextlib
from pathlib import Path
from typing import Literal

_FIELDS = {"now": "VmRSS:", "most": "VmHWM:"}


def resident_bytes(when: Literal["now", "most"]) -> int | None:
    """Bytes of this process that are in memory now, or the most that ever were; None where nobody tells.

    Source: Linux, proc_pid_status(5). (getrusage's maximum begins with that of the process's parent.)

    >>> 0 < resident_bytes("now") <= resident_bytes("most")
    True
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(_FIELDS[when]):
                return int(line.split()[1]) * 1024
    return None
