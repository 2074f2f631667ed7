"""``aiotime.keep_freed_memory()``: the C library keeps freed memory for the next frame.

    without:  every activation  mmap or grow ─▶ a page fault per 4 KiB ─▶ use ─▶ free ─▶ munmap or trim
    with:     the first frame   grow ─▶ page faults ─▶ use ─▶ free;   each later one   use ─▶ free

Page faults and mmap take a lock that all threads of a process share, so CPU stages hold each other up there.
"""

from __future__ import annotations

import ctypes
import os

MEBIBYTE = 2**20

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3

# A thread other than the main one allocates from heaps of 64 MiB: it could not keep a larger block. Older glibc
# refuses more than 32.
MMAP_THRESHOLDS = (64 * MEBIBYTE, 32 * MEBIBYTE)
NEVER = -1
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
PAD = 64 * MEBIBYTE  # a whole heap: less, and a thread gives a heap back as soon as nothing in it is used


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next frame; return whether it does.

    A net with activations of megabytes may spend a fifth of its time on page faults, because glibc gives the memory of
    each activation back to the system and asks for it again. Blocks of up to 64 MiB (32 MiB where an older glibc
    takes no more) stay with the process from now on, those of worker threads as well. Larger ones are mapped and given
    back as before.

    The price: the process keeps the most memory it has used at once in such blocks. It holds for the whole process,
    from now on, and cannot be undone; so call it first, and only where the process is yours. Calling it again changes
    nothing. `aiotime.run` and the command line call it.

    Returns False, and changes nothing, where the C library is not glibc (musl, macOS, Windows), where another malloc
    has been loaded in its place, and where somebody has decided: one of glibc's variables for these settings in the
    environment (``MALLOC_TRIM_THRESHOLD_``, …), or ``glibc.malloc`` in ``GLIBC_TUNABLES``.

    Example:
        >>> aiotime.keep_freed_memory() in (True, False)
        True
    """
    if _decided():
        return False
    glibc = _glibc()
    if glibc is None:
        return False
    mallopt = glibc.mallopt
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    # Each of them ends glibc's own adjusting of the threshold from 128 KiB upwards. So the threshold comes first:
    # without it the other two would make things worse.
    if not any(mallopt(M_MMAP_THRESHOLD, size) for size in MMAP_THRESHOLDS):
        return False
    trim, pad = mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_TOP_PAD, PAD)
    return bool(trim and pad)


def _decided() -> bool:
    """Whether whoever started the process has told malloc what to do."""
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(map(os.environ.get, SETTINGS))


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and its malloc is the one in use."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        used = ctypes.CDLL(None).malloc
        if not hasattr(glibc, "gnu_get_libc_version"):
            return None
        own = glibc.malloc
    except (OSError, AttributeError, TypeError):  # TypeError: Windows knows no CDLL(None)
        return None
    same = ctypes.cast(own, ctypes.c_void_p).value == ctypes.cast(used, ctypes.c_void_p).value
    return glibc if same and hasattr(glibc, "mallopt") else None
