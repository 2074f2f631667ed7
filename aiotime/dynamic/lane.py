"""Lane: what one device stream does next, chosen when it can run: backward before forward, the fullest batch first.

    calls ──▶ inboxes of the stations ─┐
                                       ├─ turn: is the loop quiet? ── launch ──▶ device stream ──▶ settled ──▶ turn …
    gradients ──▶ batches to turn back ┘

A batch is formed as late as possible: while the device is busy calls gather by themselves; while it is idle the lane
waits until the loop has been quiet for `QUIET` turns, that is, until the instances that the last batch woke have made
their next calls. Waiting costs microseconds; a call that runs alone costs a batch. No station is passed over for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotime.devices.base import DeviceStream
from aiotime.dynamic.batch import Batch
from aiotime.dynamic.inbox import PASSED_OVER

if TYPE_CHECKING:
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.station import Station

QUIET = 2  # turns of the loop without a new call
AHEAD = 2  # jobs launched and not settled, where the second is a full batch or a backward: nothing is gained by waiting


class Lane:
    """One device stream and the stations that share it."""

    __slots__ = (
        "_arrived",
        "_back",
        "_floor",
        "_quiet",
        "_seen",
        "_timer",
        "_turning",
        "running",
        "stations",
        "stream",
    )

    def __init__(self, floor: Floor, stream: DeviceStream) -> None:
        self._floor = floor
        self.stream = stream
        self.stations: list[Station] = []
        self.running = 0  # jobs launched and not settled
        self._back: dict[Batch, None] = {}  # with rows to turn back, complete or not, in the order they came
        self._arrived = 0
        self._seen = 0
        self._quiet = 0
        self._turning = False
        self._timer = False

    @property
    def waiting(self) -> int:
        """Batches with rows that wait for their backward."""
        return len(self._back)

    def arrived(self) -> None:
        """A call was put into the inbox of one of the stations."""
        self._arrived += 1
        if not self._turning:
            self._turn_soon()

    def turn_back(self, batch: Batch) -> None:
        """Gradients of rows of ``batch`` are there."""
        self._back[batch] = None
        self._arrived += 1
        if not self._turning:
            self._turn_soon()

    def settled(self) -> None:
        """A job that was counted has ended, or never began."""
        self.running -= 1
        self.look()

    def look(self) -> None:
        """Is there something to do?"""
        if not self._turning and (self._back or any(len(station.inbox) for station in self.stations)):
            self._turn_soon()

    def _turn_soon(self) -> None:
        self._turning = True
        self._quiet = 0
        self._floor.loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        if self._arrived != self._seen:
            self._seen, self._quiet = self._arrived, 0
        else:
            self._quiet += 1
        while self._launch():
            if self.stream.wants_host_ready:  # it has run here and now: let others have the loop
                break
        wanted = self._back or any(len(station.inbox) for station in self.stations)
        if wanted and (self._quiet < QUIET or (self.running == 0 and self._ready())):
            self._floor.loop.call_soon(self._take_turn)
        else:
            self._turning = False

    def _ready(self) -> bool:
        return (bool(self._back) and not self._floor.jobs) or any(
            len(station.inbox) and not station.hesitates() for station in self.stations
        )

    def _launch(self) -> bool:
        """Launch one job if there is room and reason."""
        if self.running >= AHEAD:
            return False
        some: Batch | None = None
        for batch in self._back:
            if batch.left == 0:
                return self._turn(batch)
            if some is None or len(batch.ready) > len(some.ready):
                some = batch
        station = self._fullest()
        if station is None:
            # a batch is turned back in parts only where all devices idle: its graph is walked again for each part
            idle = not self._floor.jobs and self._quiet >= QUIET
            return some is not None and idle and self._turn(some)
        calls = station.inbox.take()
        if calls:  # else they had been withdrawn
            self.running += 1
            station.launch_forward(calls)
        return True

    def _turn(self, batch: Batch) -> bool:
        del self._back[batch]
        self.running += 1
        batch.station.launch_backward(batch)
        return True

    def _fullest(self) -> Station | None:
        """The station whose next forward takes the most calls, but first one that was passed over `PASSED_OVER` times.

        Those that hesitate are left out.
        """
        best: Station | None = None
        most = 0
        for station in self.stations:
            if not len(station.inbox):
                continue
            size = station.inbox.largest
            full = size >= station.most
            overdue = station.passed >= PASSED_OVER
            if not full and not overdue and (self.running or (station.batches and self._quiet < QUIET)):
                continue
            if not full and station.hesitates():
                self._look_again(station)
                continue
            if overdue:
                best = station
                break
            if size > most:
                best, most = station, size
        if best is not None:
            for station in self.stations:
                station.passed = station.passed + 1 if station is not best and len(station.inbox) else 0
        return best

    def _look_again(self, station: Station) -> None:
        """When the oldest call has waited as long as it may."""
        if not self._timer:
            self._timer = True
            self._floor.call_later(station.patience(), self._timed)

    def _timed(self) -> None:
        self._timer = False
        if not self._turning:
            self._turn_soon()
            self._quiet = QUIET
