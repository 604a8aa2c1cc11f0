"""The C library's memory allocator, told to keep what a batch frees: the next batch needs the same again.

glibc maps every large block afresh and gives it back when it is freed. The kernel then clears each page again when it
is first touched, batch after batch.
"""

from __future__ import annotations

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
# Activations of a batch take some 100 MiB each. Older releases refuse more than half a heap, 32 MiB.
_MMAP_THRESHOLDS = (2**30, 32 * 2**20)


def tune_allocator() -> tuple[bool, str]:
    """Let glibc keep freed memory for the next batch instead of returning it to the kernel.

    For the whole process and for good: the former thresholds cannot be read, hence not restored. Memory that was once
    used stays with the process. The command line calls this; the library never does by itself.

    Returns:
        (True, what was set), or (False, why nothing was): another C library, or glibc refused.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        return False, f"the C library is {library or 'not glibc'}, whose allocator has no such thresholds"
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    kept = next((size for size in _MMAP_THRESHOLDS if mallopt(_M_MMAP_THRESHOLD, size) == 1), None)
    if kept is None:
        return False, f"glibc {version} refuses mallopt(M_MMAP_THRESHOLD, {_MMAP_THRESHOLDS[-1]})"
    if mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) != 1:
        return False, f"glibc {version} refuses mallopt(M_TRIM_THRESHOLD, {_LARGEST_INT})"
    return True, f"glibc {version}: freed memory is kept, in blocks of up to {kept >> 20} MiB"
