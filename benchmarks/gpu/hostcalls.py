"""Functions of the C library that a GPU may call when it gets there, and how Python hears of it. No Python in between.

    stream: … work ── cudaLaunchHostFunc(sem_post, semaphore) ──▶ thread in sem_wait, without the GIL
                  └── cudaLaunchHostFunc(fflush, file) ─────────▶ pipe ──▶ the loop's selector

A host function gets one pointer and returns nothing. ``sem_post`` takes just that; ``write`` takes three arguments, so
a pipe is rung through a buffered C file: the byte is put into its buffer at the launch, and ``fflush`` writes it.
A Python function must never be given: the driver's thread would need the GIL, which somebody may hold who waits for
the driver (numba-cuda 317, LMCache 2952).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fdopen.restype = ctypes.c_void_p
_LIBC.fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
_LIBC.fputc.argtypes = [ctypes.c_int, ctypes.c_void_p]
_LIBC.fclose.argtypes = [ctypes.c_void_p]
_LIBC.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
for _name in ("sem_wait", "sem_post", "sem_destroy", "fflush"):
    getattr(_LIBC, _name).argtypes = [ctypes.c_void_p]

SEMAPHORE_BYTES = 64  # sem_t has 32 on Linux's 64-bit machines


def address(name: str) -> int:
    """Where a function of the C library lies."""
    found = ctypes.cast(getattr(_LIBC, name), ctypes.c_void_p).value
    assert found is not None, "a function that was found has an address"
    return found


class Semaphore:
    """A POSIX semaphore in memory of ours; the GPU posts, a thread waits."""

    function = address("sem_post")

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(SEMAPHORE_BYTES)
        self.argument = ctypes.addressof(self._memory)
        if _LIBC.sem_init(self.argument, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "sem_init")

    def wait(self) -> None:
        """Sleep until it was posted; the GIL is let go of."""
        while _LIBC.sem_wait(self.argument) != 0:  # a signal came
            pass

    def post(self) -> None:
        """Post it from here, to end a waiter."""
        _LIBC.sem_post(self.argument)

    def close(self) -> None:
        """Nobody waits any more."""
        _LIBC.sem_destroy(self.argument)


class Doorbell:
    """A pipe that the GPU rings through a buffered file: one byte a frame."""

    function = address("fflush")

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        found = _LIBC.fdopen(writer, b"w")
        if not found:
            raise OSError(ctypes.get_errno(), "fdopen")
        self.argument: int = found

    def load(self) -> None:
        """Put the byte of one frame into the buffer; before the launch."""
        _LIBC.fputc(1, self.argument)

    def take(self) -> int:
        """Bytes that have come."""
        try:
            return len(os.read(self.reader, 4096))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close both ends."""
        _LIBC.fclose(self.argument)
        os.close(self.reader)


class Launcher:
    """``cudaLaunchHostFunc`` of the runtime that PyTorch has loaded, or the driver's own ``cuLaunchHostFunc``."""

    def __init__(self) -> None:
        path = loaded("libcudart.so")
        if path is not None:
            self.name = "cudaLaunchHostFunc"
            self._call = ctypes.CDLL(path).cudaLaunchHostFunc
        else:  # linked into PyTorch: the driver knows the same streams
            self.name = "cuLaunchHostFunc"
            self._call = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._call.restype = ctypes.c_int

    def __call__(self, stream: int, function: int, argument: int) -> None:
        """Queue ``function(argument)`` on ``stream``; ctypes lets go of the GIL meanwhile."""
        code = self._call(stream, function, argument)
        if code != 0:
            raise RuntimeError(f"{self.name} returned error {code}")


def loaded(name: str) -> str | None:
    """The path of a library in this process whose file name starts with ``name``."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(name):
            return path
    return None
