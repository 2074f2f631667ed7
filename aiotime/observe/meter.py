"""The counters a device stream keeps while it works: always on, so they cost a fraction of a microsecond.

One `Recorder` belongs to one thread (or to the loop), so nothing here takes a lock; readers add up.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from threading import Lock
from typing import Protocol

LOOP_LANE = "loop"  # where a trace shows what the event loop does
WINDOW = 1024  # newest durations kept for quantiles; a power of two, see Ring.add


class Tracer(Protocol):
    """Where slices of work are written while a trace is being recorded."""

    def slice(self, lane: str, name: str, start: float, end: float, frame: int | None = None) -> None:
        """Something called ``name`` occupied ``lane`` from ``start`` to ``end`` (seconds); any thread."""

    def instant(self, lane: str, name: str, at: float, frame: int | None = None) -> None:
        """Something called ``name`` happened on ``lane`` at ``at`` (seconds)."""

    def counter(self, name: str, at: float, value: float) -> None:
        """The quantity ``name`` is ``value`` from ``at`` (seconds) on."""


class Ring:
    """The newest `WINDOW` durations in seconds, for quantiles of what happens now rather than ever."""

    __slots__ = ("_values", "count")

    def __init__(self) -> None:
        self.count = 0
        self._values = array("d", bytes(8 * WINDOW))

    def add(self, seconds: float) -> None:
        """Remember one duration; the oldest is forgotten."""
        self._values[self.count & (WINDOW - 1)] = seconds
        self.count += 1

    def newest(self, number: int) -> list[float]:
        """The newest ``number`` (at most), in no particular order."""
        number = min(number, self.count, WINDOW)
        end = self.count & (WINDOW - 1)
        return list(self._values[max(0, end - number) : end]) or self.values()[-number:]

    def values(self) -> list[float]:
        """A copy, in no particular order."""
        return list(self._values[: min(self.count, WINDOW)])


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``values`` lie (nearest rank); 0.0 for an empty list."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class FrameNumbers(int):
    """The number of the first of several frames that were one job; `others` are those of the rest."""

    others: tuple[int, ...]

    @classmethod
    def of(cls, first: int, others: Sequence[int]) -> int:
        """``first`` itself where it was alone."""
        if not others:
            return first
        made = cls(first)
        made.others = tuple(others)
        return made


class Tally:
    """What became of frames without a job of their own, at a stage where several run as one."""

    __slots__ = ("_lock", "failed", "joined", "passed")

    def __init__(self) -> None:
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.joined = 0  # in the job of another
        self.passed = 0  # failed upstream, cancelled, expired
        self.failed = 0  # and are not counted with their job

    def fail(self, frames: int) -> None:
        """That many failed; any thread, unlike the others, which belong to whoever asks for jobs."""
        if frames:
            with self._lock:
                self.failed += frames


class Recorder:
    """What one worker did for one stage: jobs, failures, busy and idle seconds, newest durations."""

    __slots__ = ("busy", "failed", "idle_input", "idle_output", "jobs", "lane", "passed", "service", "stage", "tracer")

    def __init__(self, stage: str, lane: str) -> None:
        self.stage = stage
        self.lane = lane  # the device stream this worker drives, as shown in a trace
        self.jobs = 0
        self.failed = 0
        self.passed = 0  # jobs not run: an upstream error, a cancelled or expired frame, a control frame
        self.busy = 0.0  # seconds
        self.idle_input = 0.0  # seconds without work because nothing came from upstream
        self.idle_output = 0.0  # seconds without work because all credits were held downstream
        self.service = Ring()
        self.tracer: Tracer | None = None

    def reset(self) -> None:
        """Start counting anew."""
        self.jobs = self.failed = self.passed = 0
        self.busy = self.idle_input = self.idle_output = 0.0
        self.service = Ring()

    def add(self, start: float, end: float, frame: int) -> None:
        """One job ran from ``start`` to ``end`` seconds."""
        self.jobs += 1
        self.busy += end - start
        self.service.add(end - start)
        if self.tracer is not None:
            self.tracer.slice(self.lane, self.stage, start, end, frame)
