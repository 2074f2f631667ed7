"""Seconds: what a part may spend, and how a part divides them. The clock is injected, so that tests turn it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Budget:
    """Seconds from now on.

    Args:
        seconds: that may be spent.
        now: a monotonic clock.
    """

    def __init__(self, seconds: float, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain, 0.0 at the least."""
        return max(0.0, self.seconds - self.spent)

    def share(self, among: int) -> float:
        """Seconds for the next of ``among`` equal pieces of work that are still to do."""
        return self.left / max(1, among)

    def part(self, seconds: float) -> Budget:
        """A budget of its own of at most ``seconds``, not longer than this one lasts."""
        return Budget(min(seconds, self.left), now=self._now)


def allowance(own: float, later: Sequence[float], left: float) -> float:
    """Seconds that a part may take: its own, and what the parts before have saved, but not what later ones count on.

    Args:
        own: promised to this part.
        later: promised to each part behind it.
        left: of the whole.
    """
    return max(min(own, left), left - sum(later))


def slices(stamps: Sequence[float], start: float, end: float, pieces: int = 5) -> list[float]:
    """Events per second in each of ``pieces`` equal slices between ``start`` and ``end``: how steady was it?"""
    length = (end - start) / pieces
    if length <= 0:
        return []
    counts = [0] * pieces
    for stamp in stamps:
        if start <= stamp < end:
            counts[min(pieces - 1, int((stamp - start) / length))] += 1
    return [count / length for count in counts]
