"""A GPU made of threads, to run the measurements' code where there is none. Its figures mean nothing.

A stream is a thread that does one thing after the other, truly later than the launch; an event knows when it was
passed, on the host's clock. Host functions are called by that thread, natively, as the driver would.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

from aiotime.devices.accelerator import Accelerator

_NATIVE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DryEvent:
    """Passed when the stream's thread has come to its newest record."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._recorded = self._reached = 0
        self.stamp = 0.0

    def recorded(self) -> int:
        """It was put behind some work; the number of this record."""
        with self._changed:
            self._recorded += 1
            return self._recorded

    def reach(self, number: int) -> None:
        """The stream's thread has come to that record."""
        with self._changed:
            self.stamp = time.perf_counter()
            self._reached = max(self._reached, number)
            self._changed.notify_all()

    def query(self) -> bool:
        """Has it passed? Who asks lets go of the GIL: a GPU does not need it to go on, this one does."""
        if self._reached >= self._recorded:
            return True
        time.sleep(0)
        return self._reached >= self._recorded

    def synchronize(self) -> None:
        """Sleep until it has."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached >= self._recorded)


class DryStream:
    """A thread that does what is queued, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="dry stream")
        self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def push(self, job: Callable[[], None]) -> None:
        """Queue ``job``."""
        self._queue.put(job)

    def record_event(self, event: DryEvent) -> DryEvent:
        """Behind what is queued so far."""
        number = event.recorded()
        self.push(lambda: event.reach(number))
        return event

    def wait_event(self, event: DryEvent) -> None:
        """What follows waits for it."""
        self.push(event.synchronize)

    def wait_stream(self, other: DryStream) -> None:
        """What follows waits for what the other has now."""
        self.wait_event(other.record_event(DryEvent()))

    def synchronize(self) -> None:
        """Sleep until it has run empty."""
        self.record_event(DryEvent()).synchronize()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()


class DryCounter:
    """A number that the stream's thread writes."""

    def __init__(self) -> None:
        self._word = ctypes.c_int64(0)

    def arm(self, stream: DryStream, number: int) -> None:
        """Queue the write."""
        stream.push(lambda: setattr(self._word, "value", number))

    def read(self) -> int:
        """What it is now; as for `DryEvent.query`."""
        time.sleep(0)
        return self._word.value


class DryBackend:
    """As much of `aiotime.devices.backend.Backend` as marks and pools use."""

    kind = "dry"

    def __init__(self) -> None:
        self.accelerators: dict[int, Accelerator] = {}

    def new_event(self, *, timing: bool = False) -> DryEvent:
        """One that sleeps."""
        return DryEvent()


class DryRuntime:
    """Threads in place of a GPU; a `benchmarks.gpu.runtime.Runtime`."""

    name = "dry"
    host_launcher = "a thread"

    def __init__(self) -> None:
        self.backend: Any = DryBackend()
        self._streams: list[DryStream] = []

    def stream(self, *, priority: int = 0) -> DryStream:
        """A thread more."""
        self._streams.append(DryStream())
        return self._streams[-1]

    def event(self, *, timing: bool = False, blocking: bool = False) -> DryEvent:
        """All of them keep the time."""
        return DryEvent()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Nothing is current here."""
        return nullcontext(stream)

    def spin(self, stream: DryStream, seconds: float) -> None:
        """Sleep, and leave the cores to others."""
        stream.push(lambda: time.sleep(seconds))

    def tiny(self, stream: DryStream) -> None:
        """Nothing, later."""
        stream.push(lambda: None)

    def elapsed(self, start: DryEvent, end: DryEvent) -> float:
        """By the host's clock."""
        return end.stamp - start.stamp

    def counter(self, capacity: int) -> DryCounter:
        """In the host's memory, like the real one."""
        return DryCounter()

    def call_host(self, stream: DryStream, function: int, argument: int) -> None:
        """The native function, from the stream's thread."""
        native = _NATIVE(function)
        stream.push(lambda: native(argument))

    def replayed(self, stream: DryStream, kernels: int) -> Callable[[], None]:
        """So many nothings at once."""

        def nothings() -> None:
            for _ in range(kernels):
                pass

        return lambda: stream.push(nothings)

    def synchronize(self) -> None:
        """All streams."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """End the threads."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()
