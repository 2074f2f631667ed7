"""Entrance: what a run or a request needs of whatever is open behind the door.

source ─▶ run ─┐                  ┌─▶ engine of a pipeline: the frame goes from stage to stage
               ├─ door ─ enter ───┤
submit ─▶ request                 └─▶ floor of a network: the frame becomes a coroutine of its own
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from aiotime.errors import AiotimeError
from aiotime.frame import Frame, Owner, Prediction
from aiotime.ingest.door import Door
from aiotime.observe.meter import Tracer


class Guest(Protocol):
    """A run, as draining and closing see it."""

    def stop(self) -> None:
        """Pull nothing more."""

    def refused(self, why: AiotimeError) -> None:
        """The pipeline has ended."""


class Enrolment(Protocol):
    """Whoever must hear of a frame before it enters: what learns from it."""

    def enrol(self, frame: Frame, *, cut: bool) -> None:
        """``frame`` comes next; raises `InputError` where it cannot be learned from."""


class Entrance(Protocol):
    """Takes frames in and says what became of them."""

    undelivered: float  # frame-seconds that results waited for their consumer

    @property
    def name(self) -> str:
        """For task names."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where it is open."""

    @property
    def now(self) -> Callable[[], float]:
        """Seconds on its clock."""

    @property
    def door(self) -> Door:
        """Whose credits bound what is inside."""

    @property
    def runs(self) -> set[Guest]:
        """That are under way."""

    @property
    def counts(self) -> dict[str, int]:
        """Frames in, out, shed, failed."""

    @property
    def course(self) -> Enrolment | None:
        """Of a pipeline that learns."""

    @property
    def tracer(self) -> Tracer | None:
        """Where to note what happens, while somebody records."""

    def new_frame(self, owner: Owner, index: int, payload: Any) -> Frame:
        """A frame that arrives now; it has taken no credit yet."""

    def enter(self, frame: Frame) -> None:
        """A credit was granted: the frame goes in. No await between the two."""

    async def flush(self) -> None:
        """Wait until every frame that entered so far has been learned from."""

    def prediction(self, frame: Frame, index: int, gap: int) -> Prediction:
        """What the consumer gets of a settled frame."""
