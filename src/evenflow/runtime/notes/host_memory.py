"""What this process holds of the host's memory, and the C library's allocator, told to keep what is freed.

By default glibc gives large blocks back to the system as they are freed, and every page of the next one costs
a fault: 2 microseconds on a small virtual machine, 25 ms for 48 MiB. A pipeline's step frees and allocates
the same sizes over and over; so, like torch's own allocator on GPUs, a process keeps its peak.
"""

import contextlib
import ctypes
import functools
import platform
from pathlib import Path
from typing import Literal

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST = 2**31 - 1  # blocks above it still come from the system and go back
# Of /proc/self/status, which counts Python and torch too.
_FIELDS = {"now": "VmRSS:", "most": "VmHWM:"}


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors that it frees; whether its C library can do that.

    Example:
        >>> keep_freed_memory() or platform.libc_ver()[0] != "glibc"
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGEST) and set_option(_M_TRIM_THRESHOLD, _NEVER))


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
