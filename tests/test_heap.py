"""Tests of aiotime.heap: freed memory is kept where glibc lets us, and nowhere else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import aiotime
from aiotime import heap

HAS_GLIBC = heap._glibc() is not None
needs_glibc = pytest.mark.skipif(not HAS_GLIBC, reason="the C library here is not glibc")

# Blocks of 1 MiB that are freed and asked for again: their pages are new each time, or there from the first time on.
CHURN = """
import ctypes, resource, sys, threading
import aiotime
print(aiotime.keep_freed_memory())
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def churn(times):
    for _ in range(times):
        blocks = [libc.malloc(2**20) for _ in range(20)]
        for block in blocks:
            ctypes.memset(block, 1, 2**20)
        for block in blocks:
            libc.free(block)
def work():
    churn(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    churn(10)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def fresh(code: str, **environment: str) -> list[str]:
    """What ``code`` prints in a process of its own, where malloc has been told nothing but ``environment``."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    finished = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=50, check=True
    )
    return finished.stdout.split()


def test_it_says_whether_memory_is_kept_and_says_so_again() -> None:
    """A bool, the same each time."""
    said = fresh("import aiotime; print(*(aiotime.keep_freed_memory() for _ in range(3)))")
    assert said == [str(HAS_GLIBC)] * 3


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    """Blocks freed and asked for again cost no page faults, on the main thread and on another."""
    kept, on_main, on_worker = fresh(CHURN)
    assert kept == "True"
    pages = 10 * 20 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(on_main) < pages / 20
    assert int(on_worker) < pages / 20


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_TOP_PAD_": "1024"},
        {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_says_is_left_alone(environment: dict[str, str]) -> None:
    """Whoever started the process and told malloc what to do is right."""
    assert fresh("import aiotime; print(aiotime.keep_freed_memory())", **environment) == ["False"]


@needs_glibc
def test_tunables_of_other_parts_are_no_word_about_memory() -> None:
    """GLIBC_TUNABLES may be about something else, an empty variable is about nothing."""
    said = fresh(
        "import aiotime; print(aiotime.keep_freed_memory())",
        GLIBC_TUNABLES="glibc.cpu.x86_shstk=off",
        MALLOC_TRIM_THRESHOLD_="",
    )
    assert said == ["True"]


class Libc:
    """A C library that notes what mallopt is told, and refuses some of it."""

    def __init__(self, refuses: Callable[[int, int], bool]) -> None:
        self.told: list[tuple[int, int]] = []

        def mallopt(parameter: int, value: int) -> int:
            self.told.append((parameter, value))
            return int(not refuses(parameter, value))

        self.mallopt = mallopt


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment says nothing about malloc."""
    monkeypatch.setattr(heap, "_decided", lambda: False)


@pytest.mark.usefixtures("undecided")
def test_an_older_glibc_gets_the_most_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused threshold is tried again at 32 MiB; the rest follows."""
    libc = Libc(lambda parameter, value: parameter == heap.M_MMAP_THRESHOLD and value > 32 * heap.MEBIBYTE)
    monkeypatch.setattr(heap, "_glibc", lambda: libc)
    assert aiotime.keep_freed_memory() is True
    assert libc.told[1:] == [
        (heap.M_MMAP_THRESHOLD, 32 * heap.MEBIBYTE),
        (heap.M_TRIM_THRESHOLD, -1),
        (heap.M_TOP_PAD, heap.PAD),
    ]


@pytest.mark.usefixtures("undecided")
def test_without_the_threshold_the_rest_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other settings alone would stop glibc from adjusting, and so cost more than they bring."""
    libc = Libc(lambda parameter, value: parameter == heap.M_MMAP_THRESHOLD)
    monkeypatch.setattr(heap, "_glibc", lambda: libc)
    assert aiotime.keep_freed_memory() is False
    assert {parameter for parameter, _ in libc.told} == {heap.M_MMAP_THRESHOLD}


@pytest.mark.usefixtures("undecided")
def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no glibc the answer is False."""

    def missing(name: str | None) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert aiotime.keep_freed_memory() is False


def test_run_keeps_memory_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that calls run() owns its process; keep_memory=False leaves malloc alone."""
    calls: list[None] = []
    monkeypatch.setattr("aiotime.loop.keep_freed_memory", lambda: calls.append(None))

    async def main() -> int:
        return len(calls)

    assert aiotime.run(main(), keep_memory=False) == 0
    assert aiotime.run(main()) == 1
