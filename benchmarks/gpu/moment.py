"""When did the device finish, on the host's clock? Two clocks brought together by bounds that both sides must keep.

    host    before ──────────── after            before ≤ the mark passed ≤ after, on the host's clock
    device         ── mark ──                    device seconds of the same mark, from a reference event

A mark put on an idle stream cannot pass before the host asked for it, nor after the host saw it passed. So the offset
(host - device) lies between ``before - device`` and ``after - device`` for every such bracket, and in the intersection
of many. Nothing is assumed about how long a launch or an answer takes. The clocks drift (tens of µs a second are
usual), so brackets are taken before and after what is measured, and the offset is interpolated between.

What is reported: the middle of the interval as the moment of completion, half of its width as the uncertainty. Where
something is promised, the uncertainty is counted against us.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bracket:
    """One mark on an idle stream, in seconds.

    Attributes:
        before: on the host's clock, when the mark was asked for.
        device: of the mark, on the device's clock from the reference on.
        after: on the host's clock, when the mark was seen to have passed.
    """

    before: float
    device: float
    after: float


@dataclass(frozen=True, slots=True)
class Offset:
    """Bounds on host minus device, in seconds, at the device's time ``at``."""

    at: float
    low: float
    high: float

    @property
    def middle(self) -> float:
        """The best guess."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """How far it may be off."""
        return abs(self.high - self.low) / 2


def offset(brackets: Sequence[Bracket]) -> Offset:
    """What all brackets allow. Drift among them may leave nothing; then the bounds change places, equally wide."""
    low = max(bracket.before - bracket.device for bracket in brackets)
    high = min(bracket.after - bracket.device for bracket in brackets)
    at = sum(bracket.device for bracket in brackets) / len(brackets)
    return Offset(at, min(low, high), max(low, high))


@dataclass(frozen=True, slots=True)
class Clocks:
    """From the device's clock to the host's, by offsets taken before and after."""

    first: Offset
    last: Offset

    def host(self, device: float) -> float:
        """The host's seconds at ``device`` seconds."""
        length = self.last.at - self.first.at
        part = (device - self.first.at) / length if length > 0 else 0.0
        return device + self.first.middle + part * (self.last.middle - self.first.middle)

    @property
    def uncertainty(self) -> float:
        """Seconds that `host` may be off."""
        return max(self.first.half, self.last.half)

    @property
    def drift(self) -> float:
        """Seconds per second that the clocks part."""
        length = self.last.at - self.first.at
        return (self.last.middle - self.first.middle) / length if length > 0 else 0.0


def brackets(
    runtime: Any, stream: Any, reference: Any, *, count: int = 40, now: Callable[[], float] = time.perf_counter
) -> list[Bracket]:
    """Marks on ``stream``, which must be idle. Spins; with the loop standing still."""
    found = []
    marks = [runtime.event(timing=True) for _ in range(count)]
    for mark in marks:
        stream.record_event(mark)  # the driver makes an event at its first record; that is not to be in the bracket
    stream.synchronize()
    for mark in marks:
        before = now()
        stream.record_event(mark)
        while not mark.query():
            pass
        after = now()
        found.append(Bracket(before, runtime.elapsed(reference, mark), after))
    return found
