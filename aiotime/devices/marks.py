"""Mark: a place in a device's queue of work, and what must stay alive until the device got there.

The caching allocator knows only the stream that memory was allocated on. A tensor that another stream
reads may be freed only when that stream has read it, or its memory is handed out again too early and data is
corrupted without a word. So the mark behind a launch *holds* what the launch uses across streams; whoever first
sees the mark passed (the lane, the poller, a waiting worker) lets it go. ``record_stream`` is not used: it
defers frees to later allocations and lets memory spike when the host runs ahead.

    frame on stage A ─── mark a {input of A} ◀── before ── mark b {output of A as input of B} ◀── …

Stage B's stream waited for a, so when b has passed, a has too: seeing the last mark of a frame frees the whole chain.

A mark outlives its event: it remembers that it passed, and its event returns to the device's pool when nobody
holds the mark any more; only then is it sure that nobody waits for the event's *next* record by mistake.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import RawStream
from aiotime.devices.poller import Pace


class Mark:
    """Recorded on ``stream`` at creation; an `aiotime.devices.base.Event`. Any thread.

    Args:
        held: let go when the mark has passed.
        before: a mark that ``stream`` (or what it waits for) has waited for.
        pace: how long waits for marks of this queue usually last.
        host: the value it guards is written into the host's memory by the device.
    """

    __slots__ = ("__weakref__", "_event", "accelerator", "before", "held", "host", "pace", "passed")

    def __init__(
        self,
        accelerator: Accelerator,
        stream: RawStream,
        *,
        held: Sequence[Any] = (),
        before: Mark | None = None,
        pace: Pace | None = None,
        host: bool = False,
    ) -> None:
        self.passed = False
        self.accelerator = accelerator
        self.held = held
        self.before = before
        self.pace = pace
        self.host = host
        self._event = accelerator.event()
        stream.record_event(self._event)

    def query(self) -> bool:
        """Has the device got here, as far as one may ask? Raises BrokenError when the device has failed."""
        if self.passed:
            return True
        try:
            passed = self.accelerator.has_passed(self._event)
        except Exception as cause:
            raise self._lost(cause) from cause
        if passed:
            self._release()
        return passed

    def synchronize(self) -> None:
        """Sleep until the device got here. Raises BrokenError when the device has failed."""
        if self.passed:
            return
        try:
            self.accelerator.wait_for(self._event)
        except Exception as cause:
            raise self._lost(cause) from cause
        self._release()

    def hold_back(self, stream: RawStream) -> None:
        """What is queued on ``stream`` from now on waits for the mark, on the device. Any device of the backend."""
        if not self.passed:
            stream.wait_event(self._event)

    def _lost(self, cause: BaseException) -> BaseException:
        self.held = ()
        self.before = None
        return self.accelerator.fault(cause)

    def _release(self) -> None:
        mark: Mark | None = self
        while mark is not None:
            before, mark.before = mark.before, None
            mark.passed = True
            mark.held = ()
            mark = before

    def __del__(self) -> None:
        if self.passed:  # otherwise it was never recorded, or the device is lost
            self.accelerator.return_event(self._event)
