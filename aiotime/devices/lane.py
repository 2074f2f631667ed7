"""Lane: what one launcher thread does with one job on an accelerator: three streams, and what they keep alive.

    host value ─▶ pinned slot ─▶ [copy-in stream] ─┐
    other device's value ─▶ [peer] ─▶ [copy-in] ───┤ event
    same device's value ── its mark ───────────────┴─▶ [compute stream: fn] ── event ─▶ [copy-out stream] ─▶ host
                                                           └ mark                           └ mark

The launcher never waits for a result: waits between streams are queued on the device. It sleeps in two places
only: when all staging slots are being copied, and when `AHEAD` launches have not been finished by the device. The
second bounds the memory and how far work runs ahead of a cancellation, and makes the time of a launch the time of the
device where that is what limits the stage.

Why three streams per lane, rather than one copy stream per device and direction: a stream that waits for one stage's
event holds up every copy queued behind it, those of other stages too. A lane is in order anyway, so here nothing
waits that could go on. The copy engines are shared by the hardware.

Who owns what, until when:
- A device copy of the input is allocated on the copy-in stream and read on the compute stream: held by the mark.
- A value from another stage was allocated on that stage's stream: held by the mark of the stage that reads it.
- An output that is copied to the host is read on the copy-out stream: held by the mark behind that copy.
- The pinned result belongs to the frame, not to a ring: users keep predictions as long as they like. It comes from
  PyTorch's caching allocator for pinned memory, which reuses freed blocks after the copies into them are done.
- What ``fn`` allocates and frees itself stays on the compute stream and is reused in its order.

A copy between two devices is run by PyTorch on the *source* device's current stream, with a barrier on both sides. Left
alone that is the default stream; so a lane has a peer stream on each device it copies from.

Not yet run on a GPU; the logic is tested on a pretended one (`aiotime.devices.pretend`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import HOST, NOWHERE, RawStream
from aiotime.devices.base import Event, Events, Pending
from aiotime.devices.marks import Mark
from aiotime.devices.poller import Pace
from aiotime.devices.staging import Ring, Slot, leaves, map_leaves
from aiotime.errors import BrokenError

AHEAD = 4  # launches that the device has not finished


def _nothing() -> None:
    pass


class Lane:
    """One thread's way onto ``accelerator``; every method is called on that thread.

    Attributes:
        before_sleep: called whenever the launcher is about to sleep, so that it keeps no news to itself meanwhile.
    """

    def __init__(self, accelerator: Accelerator, *, pace: Pace | None = None, ahead: int = AHEAD) -> None:
        self.accelerator = accelerator
        self.pace = pace
        self.before_sleep: Callable[[], None] = _nothing
        self.compute = accelerator.borrow("compute")
        self._backend = accelerator.backend
        self._index = accelerator.index
        self._ahead = ahead
        self._flights: deque[Mark] = deque()  # launches not known to be finished, oldest first
        self._copy_in: RawStream | None = None
        self._copy_out: RawStream | None = None
        self._peers: dict[int, RawStream] = {}
        self._ring = Ring(accelerator)
        self._arrived = accelerator.event()  # copy-in to compute; every wait is queued right after its record
        self._computed = accelerator.event()  # compute to copy-out, likewise

    def run(self, fn: Callable[[Any], Any], up: Pending, mine: Pending, *, host_output: bool) -> None:
        """Launch ``fn`` on the value of ``up``: sets ``mine.value`` and ``mine.event``.

        Raises what ``fn`` raises. Where the device has failed ``mine.error`` says so.
        """
        if self.accelerator.broken:
            mine.error = self.accelerator.fault()
            return
        value = up.value
        held: list[Any] = [value]
        before = self._on_device(up.event, held)
        try:
            self.make_room()
            if before is not None:
                before.hold_back(self.compute)
            value = self._bring(value, before, held)
            with self._backend.on(self.compute):
                output = fn(value)
            mark = None
            if host_output:
                output, mark = self._send(output, before, held)
            if mark is None:
                mark = self._mark(self.compute, before, held)
            mine.value, mine.event = output, mark
        except BaseException as cause:
            self._failed(cause, before, held, mine)
            if mine.error is None:
                raise

    def retire(self) -> None:
        """Let go of what finished launches held. A device that is found lost is told by the next `run`."""
        flights = self._flights
        try:
            while flights and flights[0].query():
                flights.popleft()
        except BrokenError:
            flights.clear()

    def close(self) -> None:
        """Wait for the device, then give streams, events and memory back."""
        accelerator = self.accelerator
        try:
            while self._flights:
                self._flights[0].synchronize()
                self._flights.popleft()
        except BrokenError:
            self._flights.clear()
            return  # nothing of a lost device goes back into a pool
        self._ring.close()
        accelerator.return_event(self._arrived)
        accelerator.return_event(self._computed)
        accelerator.return_stream("compute", self.compute)
        if self._copy_in is not None:
            accelerator.return_stream("in", self._copy_in)
        if self._copy_out is not None:
            accelerator.return_stream("out", self._copy_out)
        for index, stream in self._peers.items():
            Accelerator.of(self._backend, index).return_stream("peer", stream)

    # ------------------------------------------------------------------ in

    def _on_device(self, event: Event | None, held: list[Any]) -> Mark | None:
        """The upstream's event where our streams can wait for it; any other is waited for here.

        Of several (a batch of frames from different launches) all but the last are waited for by the compute stream.
        """
        if event is None:
            return None
        if isinstance(event, Events):
            *others, event = event.events
            for each in others:
                mark = self._on_device(each, held)
                if mark is None:
                    continue
                if mark.host or mark.accelerator is not self.accelerator:  # read by other streams of ours, too
                    mark.synchronize()
                else:
                    mark.hold_back(self.compute)
                    held.append(mark)
        if isinstance(event, Mark) and event.accelerator.backend is self._backend:
            return event
        self._sleep_for(event)
        return None

    def _bring(self, value: Any, before: Mark | None, held: list[Any]) -> Any:
        """``value`` with every array on this device, ready for what is queued on the compute stream next."""
        backend, index = self._backend, self._index
        places = {backend.where(leaf) for leaf in leaves(value)}
        places -= {index, NOWHERE}
        if not places:
            return value
        slot: Slot | None = None
        if HOST in places:
            if before is not None and before.host:
                self._sleep_for(before)  # the device is still writing what we are about to read
            slot = self._ring.take(self.before_sleep)
        if self._copy_in is None:
            self._copy_in = self.accelerator.borrow("in")
        sources = [self._peer(place) for place in places if place != HOST]
        if before is not None:
            for source in sources:
                before.hold_back(source)
        staged = 0

        def bring(leaf: Any) -> Any:
            nonlocal staged
            place = backend.where(leaf)
            if place in (index, NOWHERE):
                return leaf
            if place == HOST and slot is not None and not backend.is_pinned(leaf) and backend.stageable(leaf):
                leaf = slot.hold(staged, leaf)
                staged += 1
            moved = backend.send(leaf, index)
            held.append(moved)
            return moved

        arrived = self._arrived if slot is None else slot.event
        try:
            with backend.on(*sources, self._copy_in):
                return map_leaves(bring, value)
        finally:  # also after a failure: the slot and what was copied are in use until then
            self._copy_in.record_event(arrived)
            self.compute.wait_event(arrived)

    def _peer(self, index: int) -> RawStream:
        if index not in self._peers:
            self._peers[index] = Accelerator.of(self._backend, index).borrow("peer")
        return self._peers[index]

    # ------------------------------------------------------------------ out

    def _send(self, output: Any, before: Mark | None, held: list[Any]) -> tuple[Any, Mark | None]:
        """``output`` as it will be in the host's memory, and the mark behind that; None where it is there already."""
        backend, index = self._backend, self._index
        if all(backend.where(leaf) < 0 for leaf in leaves(output)):
            return output, None
        if self._copy_out is None:
            self._copy_out = self.accelerator.borrow("out")
        held.append(output)
        self.compute.record_event(self._computed)
        self._copy_out.wait_event(self._computed)

        def send(leaf: Any) -> Any:
            place = backend.where(leaf)
            if place < 0:
                return leaf
            if place != index:  # user code put it on another device, whose streams are not ours
                return backend.fetch(leaf)
            host = backend.download(leaf)
            held.append(host)
            return host

        with backend.on(self._copy_out):
            sent = map_leaves(send, output)
        return sent, self._mark(self._copy_out, before, held, host=True)

    def _mark(self, stream: RawStream, before: Mark | None, held: list[Any], *, host: bool = False) -> Mark:
        mark = Mark(self.accelerator, stream, held=held, before=before, pace=self.pace, host=host)
        self._flights.append(mark)
        return mark

    # ------------------------------------------------------------------ bounds and failures

    def make_room(self) -> None:
        """Wait until fewer than ``ahead`` launches are unfinished. Raises BrokenError when the device has failed."""
        self.retire()
        if self.accelerator.broken:
            raise self.accelerator.fault()
        while len(self._flights) >= self._ahead:
            self._sleep_for(self._flights[0])
            self._flights.popleft()

    def _sleep_for(self, event: Event) -> None:
        if not event.query():
            self.before_sleep()
            event.synchronize()

    def _failed(self, cause: BaseException, before: Mark | None, held: list[Any], mine: Pending) -> None:
        """Hold what the work queued before the failure still reads. A device that takes no more is lost,
        whatever the failure looked like.
        """
        mine.value = mine.event = None
        if self.accelerator.broken:
            mine.error = self.accelerator.fault()
            return
        if isinstance(cause, BrokenError) and before is not None and before.accelerator.broken:
            mine.error = cause  # the device that it came from is lost
            return
        try:
            if before is not None:
                before.hold_back(self.compute)
            if self._copy_out is not None:  # a copy to the host may be under way
                self._copy_out.record_event(self._computed)
                self.compute.wait_event(self._computed)
            self._mark(self.compute, before, held)
        except Exception:
            mine.error = self.accelerator.fault(cause)
