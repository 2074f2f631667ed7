"""What everybody shares of one accelerator in this process: pooled events and streams, and the news of its death.

Creating and destroying an event costs 20 times what taking it from a pool costs, and contends on the driver's
lock under load. Streams are pooled by role because the caching allocator keeps freed memory per stream: a pipeline
that is opened anew finds the memory of the one before.

A graph capture is void as soon as anybody waits for the whole device, on any thread and in every capture mode. So both
take one lock, `Accelerator.quiet`. What user code does it does without the lock: a capture in CUDA's default mode
forbids other threads even to ask an event, and what they are told then says nothing about the device.

Not yet run on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from aiotime.devices.backend import Backend, Graph, RawEvent, RawStream
from aiotime.errors import BrokenError

Role = Literal["compute", "in", "out", "peer", "measure", "capture"]

RETRY = 1e-3  # seconds between two tries to wait while somebody's capture forbids it
LONGEST_CAPTURE = 60.0  # seconds after which a capture that forbids waiting counts as a failure


class Accelerator:
    """Device ``index`` of ``backend``; get it from `of`. Its pools are used from any thread."""

    def __init__(self, backend: Backend, index: int) -> None:
        self.backend = backend
        self.index = index
        self.name = f"{backend.kind}:{index}"
        self.links: dict[int, tuple[float, float]] = {}  # see links.py
        self.quiet = threading.RLock()  # held around a capture, and while the whole device is waited for
        self._cause: BaseException | None = None
        self._events: deque[RawEvent] = deque()
        self._streams: dict[Role, deque[RawStream]] = {}

    @staticmethod
    def of(backend: Backend, index: int) -> Accelerator:
        """The one of this device."""
        found = backend.accelerators.get(index)
        return found if found is not None else backend.accelerators.setdefault(index, Accelerator(backend, index))

    # ------------------------------------------------------------------ pools

    def event(self) -> RawEvent:
        """An event to be recorded on this device's streams alone."""
        try:
            return self._events.pop()
        except IndexError:
            return self.backend.new_event()

    def return_event(self, event: RawEvent) -> None:
        """Nobody will ask ``event`` any more, and it has passed or every wait for it is queued."""
        self._events.append(event)

    def borrow(self, role: Role) -> RawStream:
        """A stream for one user at a time."""
        try:
            return self._streams.setdefault(role, deque()).pop()
        except IndexError:
            return self.backend.new_stream(self.index, shared=role != "capture")

    def return_stream(self, role: Role, stream: RawStream) -> None:
        """``stream`` has run empty."""
        self._streams.setdefault(role, deque()).append(stream)

    @contextmanager
    def lent(self, role: Role) -> Iterator[RawStream]:
        """A stream for the time of a ``with``, which waits for what was queued on it."""
        stream = self.borrow(role)
        try:
            yield stream
        finally:
            with suppress(Exception):  # of a lost device, say: the caller has been told
                stream.synchronize()
                self.return_stream(role, stream)

    # ------------------------------------------------------------------ waiting and capturing

    def has_passed(self, event: RawEvent) -> bool:
        """Asks ``event``. Not yet, where a capture of somebody else forbids to ask."""
        try:
            return event.query()
        except Exception as error:
            if self.backend.forbidden(error):
                return False
            raise

    def wait_for(self, event: RawEvent) -> None:
        """Block the thread until ``event`` has passed."""
        self._patiently(event.synchronize)

    def settle(self) -> None:
        """Block the thread until the device has nothing left to do, on any stream."""
        with self.quiet:
            self._patiently(lambda: self.backend.synchronize(self.index))

    def capture(self, call: Callable[[], Any], stream: RawStream) -> tuple[Graph, Any]:
        """What ``call`` queues, as a graph, and what it returns. Nobody else may use ``stream``.

        PyTorch keeps one scratch memory of cuBLAS per stream and lets go of it with the first graph of that stream that
        dies; so a stream has one graph at a time.
        """
        with self.quiet:
            return self.backend.capture(call, stream)

    def _patiently(self, wait: Callable[[], None]) -> None:
        until = time.monotonic() + LONGEST_CAPTURE
        while True:
            try:
                return wait()
            except Exception as error:
                if not self.backend.forbidden(error) or time.monotonic() > until:
                    raise
            time.sleep(RETRY)

    # ------------------------------------------------------------------ life

    @property
    def broken(self) -> bool:
        """It failed in a way that lasts; every further call into it would fail."""
        return self._cause is not None

    def fault(self, cause: BaseException | None = None) -> BrokenError:
        """The device failed with ``cause`` (None: as it did before): what to tell whoever depended on it.

        An error that shows at an event belongs to work launched before, often long before, and leaves the
        process's context on the device unusable.
        """
        if self._cause is None and cause is not None:
            self._cause = cause.with_traceback(None)  # a traceback would pin payloads
        reason = self._cause
        hint = " (with CUDA_LAUNCH_BLOCKING=1 to see the guilty operation)" if self.backend.kind == "cuda" else ""
        error = BrokenError(
            f"{self.name} failed and can do nothing more in this process; restart the process{hint}: "
            f"{type(reason).__name__}: {reason}"
        )
        error.__cause__ = reason
        return error
