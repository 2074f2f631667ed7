"""Agenda: when a stage's next batch is formed: as its device stream comes to the token of a frame.

    stream's queue:   token 1 · token 2 · another stage's job · token 3
                      └ batch of 1, 2 (and 3, where it is ready)   └ SERVED

The stream got a token per frame, in the order of the launches, among the jobs of other stages. A batch uses up the
tokens of all its frames; those too many are answered with `SERVED`, and are spent before a new batch is begun. So when
a token is due the first frame that waits is its own (or, with several workers, one before it), and whatever stands
behind it in the queue finds every frame served that was launched before: nothing can wait for what is behind it.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from aiotime.batching.desk import Desk
from aiotime.devices.base import SERVED, Job, Sleeper


class Agenda:
    """What the device stream of ``desk`` asks."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._surplus = 0  # tokens whose frames have been dealt with
        self._waiting: list[Sleeper] = []
        several = desk.work.workers > 1  # ask at once
        self._lock: AbstractContextManager[object] = threading.Lock() if several else nullcontext()

    def take(self, bell: Sleeper) -> Job | None:
        """The job to run now, `SERVED`, or None: ``bell`` rings when one may have become ready."""
        if bell not in self._waiting:
            self._waiting.append(bell)  # before looking: what comes while we look rings
        with self._lock:
            job, until = self._look()
        if job is not None:
            self._waiting.remove(bell)
        elif until is not None:
            bell.ring_at(until)
        return job

    def _look(self) -> tuple[Job | None, float | None]:
        """(job, when to look again)."""
        if self._surplus:
            self._surplus -= 1
            return SERVED, None
        job, dealt_with, until = self.desk.next()
        if dealt_with:
            self._surplus = dealt_with - 1
            return job or SERVED, None
        return None, until

    def poke(self) -> None:
        """Something was added or changed; any thread."""
        for bell in list(self._waiting):
            bell.ring()

    ring = poke  # as the bell of what frames wait for

    def hurry(self) -> None:
        """The pipeline ends: wait for nobody's company."""
        self.desk.hurry = True
        self.poke()
