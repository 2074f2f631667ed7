"""Captures on a pretended accelerator: which ones are under way, what voids them, and the graphs they become.

    capture(call) ──▶ operations queued on the capturing stream are kept ──▶ replay() queues them on the current stream
                          ▲ void: somebody waits for the whole device or for that stream,
                                  or (mode "global") another thread asks any event

As in CUDA, who does what voids a capture is refused, and the capture fails when it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotime.devices.pretend import Operation, PretendStream


class Refused(RuntimeError):
    """Not while somebody is capturing."""


class PretendGraph:
    """Operations to be queued as a whole."""

    def __init__(self, stream: PretendStream, operations: list[Operation]) -> None:
        self._stream = stream
        self._operations = operations

    def replay(self) -> None:
        stream = self._stream.backend.current(self._stream.index)
        for ready, effect in self._operations:
            stream.push(effect, ready)


class Capture:
    """What one thread captures on ``stream`` at the moment."""

    def __init__(self, stream: PretendStream, mode: str) -> None:
        self.stream = stream
        self.mode = mode
        self.thread = threading.get_ident()
        self.operations: list[Operation] = []
        self.void = False


class Captures:
    """Those under way in one process; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Capture] = []

    @contextmanager
    def record(self, stream: PretendStream, mode: str) -> Iterator[Capture]:
        """Capture for the time of a ``with``; fails at its end if it was voided."""
        capture = Capture(stream, mode)
        with self._lock:
            self._open.append(capture)
        try:
            yield capture
        finally:
            with self._lock:
                self._open.remove(capture)
        if capture.void:
            raise Refused("operation failed due to a previous error during capture (pretended)")

    def on(self, stream: PretendStream) -> Capture | None:
        """The one that keeps what is queued on ``stream``."""
        with self._lock:
            return next((capture for capture in self._open if capture.stream is stream), None)

    def wait_for_device(self, index: int) -> None:
        """Somebody is about to wait for the whole device."""
        self._forbid(lambda capture: capture.stream.index == index)

    def wait_for_stream(self, stream: PretendStream) -> None:
        """Somebody is about to wait for ``stream``."""
        self._forbid(lambda capture: capture.stream is stream)

    def ask_event(self) -> None:
        """Somebody is about to ask an event, or to wait for one."""
        here = threading.get_ident()
        self._forbid(lambda capture: capture.mode == "global" or capture.thread == here)

    def _forbid(self, voided: Callable[[Capture], bool]) -> None:
        with self._lock:
            spoilt = [capture for capture in self._open if voided(capture)]
            for capture in spoilt:
                capture.void = True
        if spoilt:
            raise Refused("operation not permitted when stream is capturing (pretended)")
