"""One submitted frame: its owner, and its entrant at the door.

submit ─▶ Request ─ credit ─▶ engine … settle ─▶ future ─▶ submit returns
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiotime.errors import AiotimeError, DeadlineExceeded, FrameCancelled, FrameShed
from aiotime.frame import Frame, Prediction, Sample
from aiotime.ingest.entrance import Entrance
from aiotime.ingest.inspection import InputSpec, payload_bytes


class Request:
    """A frame with a future for its answer.

    Args:
        engine: the open pipeline or network.
        payload: what was submitted; a `Sample` brings key and acknowledgement.
        spec: what it must look like; None: taken as it is.
        keep_input: some stage's ``on_error`` will want to see the input.
    """

    __slots__ = ("engine", "entered", "frame", "future")

    def __init__(self, engine: Entrance, payload: Any, spec: InputSpec | None, *, keep_input: bool = False) -> None:
        self.engine = engine
        self.entered = False
        sample = payload if type(payload) is Sample else None
        if sample is not None:
            payload = sample.input
        if spec is not None:
            payload = spec.check(payload, None, sample.key if sample is not None else None)
        self.frame = frame = engine.new_frame(self, 0, payload)
        if sample is not None:
            frame.key, frame.target, frame.ack = sample.key, sample.target, sample.ack
        if engine.course is not None:
            engine.course.enrol(frame, cut=sample is not None and sample.cut)
        if keep_input:
            frame.input = payload
        self.future: asyncio.Future[Prediction] = engine.loop.create_future()

    # Entrant, called by the door

    def enter(self) -> int | None:
        """A credit is ours; declined where nobody waits for the answer any more."""
        if self.future.done():
            return None  # cancelled or expired while it waited
        frame, engine = self.frame, self.engine
        if frame.deadline is not None and engine.now() > frame.deadline:
            self.expire()
            return None
        self.entered = True
        if engine.door.nbytes is not None:
            frame.nbytes = self.size()
        engine.enter(frame)
        return frame.nbytes

    def size(self) -> int:
        """Bytes of the payload."""
        return payload_bytes(self.frame.tail.value) if self.frame.tail is not None else 0

    def refused(self, why: AiotimeError) -> None:
        """The pipeline ended while it waited at the door."""
        self._fail(why)

    # called by whoever submitted

    async def answer(self, deadline: float | None, *, real_time: bool) -> Prediction:
        """Bring it to the door and wait. Cancelled: work that is still queued is taken out of the queue.

        Args:
            deadline: seconds after its arrival, checked; None: none.
            real_time: the engine's clock is not a virtual one.
        """
        engine = self.engine
        timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            self.frame.deadline = self.frame.arrived + deadline
            if real_time:
                timer = engine.loop.call_later(deadline, self.expire)
        engine.counts["in"] += 1
        engine.door.admit("submit", self)
        try:
            prediction = await self.future
            self.handed_over()
            return prediction
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def expire(self) -> None:
        """The deadline has passed: answer now; work still queued is passed over."""
        if not self.future.done():
            self._fail(DeadlineExceeded("the request's deadline passed before it was answered", key=self.frame.key))
            self._withdraw()

    def handed_over(self) -> None:
        """Whoever waited has the prediction."""
        if self.frame.ack is not None:
            self._acknowledge(None)

    def cancel(self) -> None:
        """Whoever waited was cancelled."""
        if self.future.cancelled():  # else it had its answer already, and that was counted
            self.engine.counts["shed"] += 1
        self._withdraw()
        self._acknowledge(FrameCancelled("the request was cancelled", key=self.frame.key))

    # Owner, called by the engine

    def settled(self, frame: Frame) -> None:
        """The outcome is there."""
        future = self.future
        if future.done():
            return
        if frame.error is None:
            self.engine.counts["out"] += 1
            future.set_result(self.engine.prediction(frame, 0, 0))
            frame.value = frame.input = None  # an idle stage task still knows its last frame
        else:
            self._fail(frame.error)

    def _withdraw(self) -> None:
        self.frame.cancelled = True
        if not self.entered:
            self.engine.door.withdraw("submit", self)

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.engine.counts["shed" if isinstance(error, FrameShed) else "failed"] += 1
            self.future.set_exception(error)
            self._acknowledge(error)

    def _acknowledge(self, error: BaseException | None) -> None:
        ack, self.frame.ack = self.frame.ack, None
        if ack is not None:
            self.engine.loop.call_soon(ack, error)
