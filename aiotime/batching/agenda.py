"""Agenda: which of the stages that share a device stream runs its next batch, asked for each token of the stream.

The stream got a token per frame, in the order of the launches, and asks once per token. A batch uses up the tokens of
all its frames: the ones too many are answered with `SERVED`. They are spent first, so a token never serves a frame
that was launched behind a job which the stream has yet to run, while one before it waits.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from aiotime.batching.desk import Desk
from aiotime.devices.base import SERVED, Job, Sleeper


class Agenda:
    """The desks of one device stream.

    Args:
        workers: of the stream; several ask at once.
    """

    def __init__(self, workers: int) -> None:
        self.desks: list[Desk] = []
        self._surplus = 0  # tokens whose frames have been dealt with
        self._waiting: list[Sleeper] = []
        self._lock: AbstractContextManager[object] = threading.Lock() if workers > 1 else nullcontext()

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
        """(job, when to look again).

        Downstream first, as that brings frames out and keeps together what came together; but full batches before
        others. No stage is passed over for ever: while others are full, it becomes full.
        """
        if self._surplus:
            self._surplus -= 1
            return SERVED, None
        soonest: float | None = None
        order = self.desks[::-1]
        if len(order) > 1:
            order.sort(key=lambda desk: not desk.full)
        for desk in order:
            job, dealt_with, until = desk.next()
            if dealt_with:
                self._surplus += dealt_with - 1
                return job or SERVED, None
            if until is not None:
                soonest = until if soonest is None else min(soonest, until)
        return None, soonest

    def poke(self) -> None:
        """Something was added or changed; any thread."""
        for bell in list(self._waiting):
            bell.ring()

    ring = poke  # as the bell of what frames wait for

    def hurry(self) -> None:
        """The pipeline ends: let nobody wait for company."""
        for desk in self.desks:
            desk.hurry = True
        self.poke()
