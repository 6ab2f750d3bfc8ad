"""The C library's allocator, told to keep what is freed for the next tensor.

By default glibc gives large blocks back to the system as they are freed, and every page of the next one costs
a fault: 2 microseconds on a small virtual machine, 25 ms for 48 MiB. A pipeline's step frees and allocates
the same sizes over and over; so, like torch's own allocator on GPUs, a process keeps its peak.
"""

import ctypes
import functools
import platform

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST = 2**31 - 1  # blocks above it still come from the system and go back


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
