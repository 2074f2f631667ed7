"""Seconds per call of a function that others call, without the time its thread was kept from running.

On a machine that does other things as well, a thread that could run sometimes waits for a core. Linux counts that
wait for each thread; it is taken off, so that a plan made on a busy machine is right for a quiet one. Waiting for
Python's lock is another matter and stays in: it is what a rehearsal is there to see.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

_EVERY = 0.001  # seconds between two looks at the clock of waits, which cost microseconds
_LOOKS = 8  # at both clocks, before a pair of them that does not agree is taken


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Stopwatch:
    """``fn`` that remembers when it was called; call it on one thread at a time.

    Args:
        fn: value -> value.
        waits: take off the time the thread waited for a core (where the system counts it).
    """

    def __init__(self, fn: Callable[[Any], Any], *, waits: bool = True) -> None:
        self._fn = fn
        self._waits = waits
        self._calls = 0
        self._next = 0.0
        self._marks: list[tuple[int, float, float, int]] = []  # (thread, time, seconds waited, calls before)

    def __call__(self, value: Any) -> Any:
        """Call ``fn``."""
        now = time.perf_counter()
        if now >= self._next:
            thread = threading.get_native_id()
            now, late = look(thread) if self._waits else (now, 0.0)
            self._marks.append((thread, now, late, self._calls))
            self._next = now + _EVERY
        self._calls += 1
        return self._fn(value)

    @property
    def began(self) -> float:
        """When it was first called (`time.perf_counter`)."""
        return self._marks[0][1]

    def seconds(self, begin: float = 0.0, end: float = float("inf")) -> float | None:
        """Mean seconds from one call to the next between the times ``begin`` and ``end``; None with too few calls."""
        laps = self._laps(begin, end)
        calls = sum(count for _, count in laps)
        return sum(spent for spent, _ in laps) / calls if calls else None

    def fastest(self) -> float | None:
        """Seconds per call in the millisecond (or the call, where longer) that went best; None with too few calls."""
        return min((spent / count for spent, count in self._laps(0.0, float("inf"))), default=None)

    def _laps(self, begin: float, end: float) -> list[tuple[float, int]]:
        """(seconds without waits, calls) from mark to mark."""
        marks = [mark for mark in self._marks if begin <= mark[1] <= end]
        return [
            ((stop - start) - (after - before), last - first)
            for (thread, start, before, first), (other, stop, after, last) in itertools.pairwise(marks)
            if thread == other and stop - start > after - before  # two clocks: they may differ by a little
        ]


def look(thread: int) -> tuple[float, float]:
    """The time, and the seconds that ``thread``, the calling one, had waited for a core at that very time.

    Where it is kept from running between two looks at the clocks, it looks again: the wait would be taken off one lap
    and stand in the next, and the first would seem to take no time, or less.
    """
    late = waited(thread)
    for _ in range(_LOOKS):
        before, now, late = late, time.perf_counter(), waited(thread)
        if late == before:
            break
    return now, late


def waited(thread: int) -> float:
    """Seconds a thread of this process has waited for a core since it started; 0.0 where nobody counts them."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:  # noqa: PTH123 - in a hot path
            return int(file.read().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0
