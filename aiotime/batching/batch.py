"""Batch: frames that run as one job, and how each gets its own outcome.

    seats of frames ── Batch ──▶ one job of the device stream ── Shared.done = True ──▶ one pending value per frame

The device stream sees an ordinary job: a frame (the batch, which stands for its first), an upstream value that is
there, and a pending value to settle. Settling that one settles those of all frames, at once and before anybody is
told; so a time-out, a lost device or a closed stream reach every frame in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiotime.devices.base import Bell, Events, Pending, stage_failed
from aiotime.errors import StageTimeout
from aiotime.frame import NOBODY, Frame
from aiotime.observe.meter import FrameNumbers

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aiotime.batching.desk import Desk


class Seat:
    """A frame that waits at a stage: what it starts from, its own result, and what must have happened before."""

    __slots__ = ("after", "error", "frame", "mine", "signature", "since", "size", "up")

    def __init__(self, up: Pending, frame: Frame, mine: Pending, after: Pending | None) -> None:
        self.up = up
        self.frame = frame
        self.mine = mine
        self.after = after  # of the control frame before it
        self.signature: Hashable = None  # once it was looked at
        self.size = 0  # rows
        self.error: BaseException | None = None  # it can be joined with nothing, and why
        self.since: float | None = None  # seconds, when it could first have run


class Batch(Frame):
    """Frames of one job; also the bell of what follows them."""

    __slots__ = ("_bells", "desk", "errors", "seats", "sizes", "up", "whole")

    def __init__(self, desk: Desk, seats: Sequence[Seat]) -> None:
        first = seats[0].frame
        others = [seat.frame.index for seat in seats[1:]]
        self.up = Pending(done=True)
        super().__init__(NOBODY, FrameNumbers.of(first.index, others), self.up, first.arrived)
        self.key = first.key
        self.desk = desk
        self.seats = seats
        self.sizes = [seat.size for seat in seats]
        self.whole = False  # its output is that of its only frame
        self.errors: list[BaseException | None] | None = None  # of each frame, where they ran one by one
        events = list({id(seat.up.event): seat.up.event for seat in seats if seat.up.event is not None}.values())
        self.up.event = events[0] if len(events) == 1 else Events(events) if events else None
        self._bells: list[Bell] = []

    def settle(self, shared: Shared) -> None:
        """Give each frame its outcome."""
        seats, error = self.seats, shared.error
        values: list[Any] = []
        if error is None:
            try:
                values = self._values(shared.value)
            except Exception as cause:
                error = stage_failed(self.desk.work, self, cause)
        if error is not None:
            self.desk.tally.fail(len(seats) - (shared.error is not None))  # the stream has counted one
        elif self.errors is not None:
            self.desk.tally.fail(sum(each is not None for each in self.errors))
        bells, completions, event = self._bells, self.desk.completions, shared.event
        for at, seat in enumerate(seats):
            mine = seat.mine
            if error is not None:
                mine.error = self._own(error, seat.frame)
            elif self.errors is not None and self.errors[at] is not None:
                mine.error = self.errors[at]
            else:
                mine.value, mine.event = values[at], event
            seat.up.value = None  # an activation dies as soon as it has been used
            mine.done = True
            bell = mine.bell
            if bell is not None and bell not in bells:
                bells.append(bell)
            if mine.frame is not None or mine.waiter is not None:
                completions.put(mine)
                if completions not in bells:
                    bells.append(completions)
        shared.value = None
        self.seats, self.errors = (), None

    def _values(self, value: Any) -> list[Any]:
        if self.errors is not None:
            rows: list[Any] = value
            return rows
        return [value] if self.whole else self.desk.joiner.part(value, self.sizes)

    def _own(self, error: BaseException, frame: Frame) -> BaseException:
        """``error`` of the job as that of one of its frames."""
        if len(self.seats) == 1 or not isinstance(error, StageTimeout):
            return error
        own = StageTimeout(
            f"stage {error.stage!r} took too long for a batch of {len(self.seats)}, frame {frame.index} among them",
            stage=error.stage,
            frame=frame.index,
            key=frame.key,
        )
        own.__cause__ = error
        return own

    def ring(self) -> None:
        """Wake whoever waits for one of the frames."""
        bells = self._bells
        while bells:
            try:
                bell = bells.pop()
            except IndexError:  # another thread was faster
                return
            bell.ring()


class Shared(Pending):
    """The pending value of a batch: done, it settles those of the frames."""

    __slots__ = ("_batch", "_done")

    def __init__(self, batch: Batch) -> None:
        self._batch: Batch | None = None
        super().__init__()
        self._batch = batch
        self.bell = batch

    @property
    def done(self) -> bool:
        """Set once, by the stream that owns the job."""
        return self._done

    @done.setter
    def done(self, done: bool) -> None:
        batch = self._batch
        self._done = done
        if done and batch is not None:
            self._batch = None
            batch.settle(self)
