"""Session: one run of a network, as the door sees it: its own credits, its lesson, its order.

run ── door: max_active_keys credits ── enter ──▶ floor: a coroutine ──▶ settle: outcome, credit back, owner told
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiotime.devices.base import Pending
from aiotime.dynamic.entry import Entry
from aiotime.dynamic.path import Path
from aiotime.dynamic.step import Step
from aiotime.frame import NOBODY, Frame, Owner
from aiotime.ingest.door import Door
from aiotime.ingest.entrance import Enrolment, Guest
from aiotime.observe.meter import Tracer

if TYPE_CHECKING:
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.lesson import Lesson


class Session:
    """What a run or a request needs of an open network.

    Args:
        floor: the open network.
        keys: instances in flight.
        lesson: how they are learned from; None: inference.
        recorded: keep each instance's path.
    """

    def __init__(self, floor: Floor, *, keys: int, lesson: Lesson | None, recorded: bool) -> None:
        self.floor = floor
        self.lesson = lesson
        self.recorded = recorded
        self.ready = None if lesson is None else floor.prepare(lesson)  # to be awaited before its first instance
        self._door = Door(keys)
        self.undelivered = 0.0

    @property
    def name(self) -> str:
        """The network's."""
        return self.floor.name

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The floor's."""
        return self.floor.loop

    @property
    def now(self) -> Callable[[], float]:
        """Seconds on the devices' clock."""
        return self.floor.now

    @property
    def door(self) -> Door:
        """Of this run alone."""
        return self._door

    @property
    def runs(self) -> set[Guest]:
        """All of the network's."""
        return self.floor.runs

    @property
    def counts(self) -> dict[str, int]:
        """All of the network's."""
        return self.floor.counts

    @property
    def course(self) -> Enrolment | None:
        """Nobody must hear of an instance before it enters."""
        return None

    @property
    def tracer(self) -> Tracer | None:
        """While somebody records."""
        return self.floor.tracer

    def new_frame(self, owner: Owner, index: int, payload: Any) -> Frame:
        """An instance to be."""
        return Entry(self, owner, index, Pending(payload, done=True), self.floor.now())

    def enter(self, frame: Frame) -> None:
        """Start its coroutine."""
        assert isinstance(frame, Entry)
        self.floor.begin(frame)

    def settle(self, entry: Entry, error: BaseException | None) -> None:
        """The one place where an instance ends; the first outcome wins."""
        if entry.settled:
            return
        entry.settled = True
        entry.error = error
        entry.tail = entry.task = None
        entry.latency = self.floor.now() - entry.arrived
        if error is None:
            self.floor.latencies.add(entry.latency)
        self._door.release(entry.nbytes)
        owner, entry.owner = entry.owner, NOBODY
        owner.settled(entry)

    async def flush(self) -> None:
        """Wait until every instance so far is in the weights."""
        await self.floor.flush()

    def prediction(self, frame: Frame, index: int, gap: int) -> Step:
        """What the consumer gets."""
        assert isinstance(frame, Entry)
        instance, frame.instance = frame.instance, None
        delay, path, calls = None, None, 0
        if instance is not None:
            calls = instance.made
            if instance.lesson is not None:
                delay = tuple(instance.lags.get(station, 0) for station in range(len(self.floor.stations)))
            if instance.recorded:
                path = Path(index, tuple(instance.visits))
        return Step(
            frame.value, index, frame.key, frame.loss, delay, frame.latency, gap, frame.target, calls=calls, path=path
        )
