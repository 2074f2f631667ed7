"""Drives a loop of frames: at saturation, at a given rate, and once for the answer. No device is known here.

Time is what passes between two results on the host, and from a frame's arrival to its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks._harness import percentile
from benchmarks.gpu.budget import slices

Now = Callable[[], float]

COARSE = 200e-6  # seconds that a sleeping thread may oversleep; the rest is spun


class Loop(Protocol):
    """A contender that is driven from outside, one frame after the other."""

    @property
    def in_flight(self) -> int:
        """Frames under way."""

    def push(self, number: int) -> list[int]:
        """Take frame ``number``; the numbers of those whose results are on the host by now, in order."""

    def poll(self) -> list[int]:
        """The numbers of those that have come since; may do some work."""

    def flush(self) -> list[int]:
        """Finish what is under way."""

    def result(self, number: int) -> Any:
        """The output of a frame that has just come."""

    def close(self) -> None:
        """The end."""


@dataclass
class Run:
    """Arrivals and results of one window, in seconds."""

    start: float
    end: float = 0.0
    stamps: list[float] = field(default_factory=list)  # of results
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Frames per second."""
        return len(self.stamps) / (self.end - self.start) if self.end > self.start else 0.0

    def figures(self) -> dict[str, Any]:
        """In words and milliseconds."""
        steady = slices(self.stamps, self.start, self.end)
        found: dict[str, Any] = {"frames": len(self.stamps), "per_s": self.rate}
        if steady:
            found["slowest_slice"], found["fastest_slice"] = min(steady), max(steady)
        if self.latencies:
            found["p50_ms"] = percentile(self.latencies, 0.5) * 1e3
            found["p99_ms"] = percentile(self.latencies, 0.99) * 1e3
        return found


def saturate(loop: Loop, seconds: float, *, fewest: int, now: Now = time.perf_counter) -> Run:
    """Frames as fast as they are taken, for ``seconds`` and until ``fewest`` have come out; the loop stays filled.

    The window begins with a result and ends with one, so that neither filling nor draining is in it.
    """
    loop.flush()
    arrived: dict[int, float] = {}
    number = 0
    run: Run | None = None
    while True:
        arrived[number] = now()
        done = loop.push(number)
        number += 1
        at = now()
        for each in done:
            came = arrived.pop(each)
            if run is None:
                run = Run(at)
                continue
            run.stamps.append(at)
            run.latencies.append(at - came)
        if run is not None and len(run.stamps) >= fewest and at - run.start >= seconds:
            run.end = run.stamps[-1]
            return run


def rest(seconds: float) -> None:
    """Sleep for nearly so long; whoever calls asks the clock again."""
    if seconds > COARSE:
        time.sleep(seconds - COARSE)


def pace(
    loop: Loop,
    rate: float,
    seconds: float,
    *,
    fewest: int,
    now: Now = time.perf_counter,
    rest: Callable[[float], None] = rest,
) -> Run:
    """Frames that arrive ``rate`` times a second whether or not the loop is ready; latency counts from the arrival."""
    loop.flush()
    count = max(fewest, int(rate * seconds))
    run = Run(now())
    due = [run.start + k / rate for k in range(count)]
    number = came = 0
    while came < count:
        if number < count and now() >= due[number]:
            done = loop.push(number)
            number += 1
        elif loop.in_flight:
            done = loop.poll()
        else:
            rest(max(0.0, due[number] - now()))
            done = []
        at = now()
        for each in done:
            run.stamps.append(at)
            run.latencies.append(at - due[each])
            came += 1
    run.end = now()
    return run


def answer(loop: Loop) -> Any:
    """The output of frame 0, cloned."""
    done = loop.push(0)
    if 0 not in done:
        done += loop.flush()
    if done != [0]:
        raise RuntimeError(f"one frame went in, {done} came out")
    return loop.result(0).clone()
