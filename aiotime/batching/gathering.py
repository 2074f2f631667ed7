"""Gathering: a device stream at which frames wait for company before the real one runs them.

    stage task ── launch ──▶ Gathering ── seat ──▶ Desk ◀── take ── Agenda ◀── a token per frame ── device stream

For the stage task it is a device stream like any other: it launches ahead of the values, frame by frame, and gets a
pending value for each.
"""

from __future__ import annotations

from collections.abc import Callable

from aiotime.batching.agenda import Agenda
from aiotime.batching.batch import Seat
from aiotime.batching.desk import Desk
from aiotime.devices.base import Agenda as AnyAgenda
from aiotime.devices.base import DeviceStream, Pending, Work
from aiotime.errors import ClosedError
from aiotime.frame import Frame


class Gathering(DeviceStream):
    """One stage's way onto ``stream``, which it may share with others.

    Args:
        stream: runs the jobs; whoever opened it closes it.
        desk: of the stage.
        burst: launches after which those of a stream on the loop are run, whatever else waits.
    """

    def __init__(self, stream: DeviceStream, desk: Desk, *, burst: int) -> None:
        self.name = stream.name
        self.wants_host_ready = stream.wants_host_ready
        self.stream = stream
        self._desk = desk
        self._agenda = Agenda(desk)
        self._control: Pending | None = None  # of the newest control frame
        self._untold: list[Pending] = []  # launched, and the stream does not know
        self._burst = burst if stream.wants_host_ready else 0

    def hurry(self) -> None:
        """The pipeline ends: wait for nobody's company."""
        self._agenda.hurry()

    def bind(self, work: Work) -> None:
        self.stream.bind(work)

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None, "a settled frame is never launched"
        self._desk.seats.append(Seat(up, frame, mine, self._control))
        self._untold.append(mine)
        if not up.done:
            up.bell = self._agenda
        if len(self._untold) == self._burst:
            self.ring()
        return mine

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        self._tell()
        self._control = self.stream.exclusive(work, action, frame, last=last)
        return self._control

    def post(self, agenda: AnyAgenda, jobs: int) -> bool:
        return self.stream.post(agenda, jobs)

    def ring(self) -> None:
        self._tell()
        self.stream.ring()

    def _tell(self) -> None:
        untold = self._untold
        if not untold:
            return
        self._untold = []
        if not self.stream.post(self._agenda, len(untold)):
            for _ in untold:
                self._desk.seats.pop()
            for mine in untold:
                mine.error, mine.done = ClosedError(f"device stream {self.name} is closed"), True
                if mine.frame is not None or mine.waiter is not None:
                    self._desk.completions.put(mine)
            self._desk.completions.ring()

    def close(self) -> None:
        self.stream.close()

    async def join(self) -> None:
        await self.stream.join()
