"""What everybody shares of one accelerator in this process: pooled events and streams, and the news of its death.

Creating and destroying an event costs 20 times what taking it from a pool costs, and contends on the driver's
lock under load. Streams are pooled by role because the caching allocator keeps freed memory per stream: a pipeline
that is opened anew finds the memory of the one before.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from aiotime.devices.backend import Backend, RawEvent, RawStream
from aiotime.errors import BrokenError

Role = Literal["compute", "in", "out", "peer", "measure"]


class Accelerator:
    """Device ``index`` of ``backend``; get it from `of`. Its pools are used from any thread."""

    def __init__(self, backend: Backend, index: int) -> None:
        self.backend = backend
        self.index = index
        self.name = f"{backend.kind}:{index}"
        self.links: dict[int, tuple[float, float]] = {}  # see links.py
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
            return self.backend.new_stream(self.index)

    def return_stream(self, role: Role, stream: RawStream) -> None:
        """``stream`` has run empty."""
        self._streams.setdefault(role, deque()).append(stream)

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
