"""``inline``: the event loop itself, for stages of microseconds, where any thread hop would cost more."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from aiotime.devices.base import (
    SERVED,
    Agenda,
    Completions,
    Device,
    DeviceStream,
    Pending,
    Work,
    passed_over,
    stage_failed,
)
from aiotime.devices.cpu import time_calls
from aiotime.errors import ClosedError, ConfigurationError
from aiotime.frame import Frame
from aiotime.observe.meter import Recorder

LULL = 50e-6  # seconds between two jobs that are the loop's own doing; why they passed is not asked


class _Doorbell:
    """Rung by other devices' threads: the loop looks at the agenda again."""

    __slots__ = ("_stream",)

    def __init__(self, stream: InlineStream) -> None:
        self._stream = stream

    def ring(self) -> None:
        loop = self._stream._completions.loop
        if asyncio._get_running_loop() is loop:
            if not self._stream._pumping:
                loop.call_soon(self._stream.pump)
            return  # it looks once more before it ends
        try:
            self._stream._completions.loop.call_soon_threadsafe(self._stream.pump)
        except RuntimeError:
            pass  # the loop is closed: nobody waits

    def ring_at(self, when: float) -> None:
        stream = self._stream
        if stream._alarm is not None:
            stream._alarm.cancel()
        stream._alarm = stream._completions.loop.call_later(max(0.0, when - stream._now()), stream.pump)


class InlineStream(DeviceStream):
    """Runs each job at its launch, on the loop. It blocks the loop for as long as the job takes.

    ``torch.inference_mode`` is entered with the first job of a burst and left by `ring`, which ends it:
    entering it costs as much as a small job. The stage task awaits nothing in between.
    """

    wants_host_ready = True

    def __init__(self, name: str, completions: Completions, now: Callable[[], float]) -> None:
        self.name = name
        self._completions = completions
        self._now = now
        self._closed = False
        self._burst: torch.inference_mode | None = None
        self._ended: dict[int, float] = {}  # by stage: when its newest job ended
        self._awaited: deque[Agenda] = deque()  # once for each job that it has yet to give
        self._pumping = False
        self._doorbell = _Doorbell(self)
        self._alarm: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] | None = None

    def bind(self, work: Work) -> None:
        work.recorders.append(Recorder(work.stage, self.name))
        self._ended[work.index] = self._now()

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None and up.done, "an inline stage is launched on a finished value"
        self._run(work, up, frame, mine, ClosedError(f"device stream {self.name} is closed") if self._closed else None)
        return mine

    def post(self, agenda: Agenda, jobs: int) -> bool:
        if self._closed:
            return False
        self._awaited.extend([agenda] * jobs)
        self.pump()
        return True

    def pump(self) -> None:
        """Run what the agendas have ready."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._awaited:
                job = self._awaited[0].take(self._doorbell)
                if job is None:
                    return
                self._awaited.popleft()
                if job is SERVED:
                    continue
                work, up, frame, mine, action = job
                if action is None:
                    self._run(work, up, frame, mine, None)
                else:
                    self._act(work, up, frame, mine, action)
        finally:
            self._pumping = False
            self.ring()
        if self._closed and self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _run(self, work: Work, up: Pending, frame: Frame, mine: Pending, error: BaseException | None) -> None:
        error = error or up.error
        if error is None and (frame.cancelled or frame.deadline is not None):
            error = passed_over(frame, self._now)
        recorder = work.recorders[0]
        if error is not None:
            mine.error = error
            recorder.passed += 1
        else:
            start = self._now()
            idle = start - self._ended[work.index]
            if idle < LULL or work.starved():
                recorder.idle_input += idle
            else:
                recorder.idle_output += idle
            try:
                if work.grad:
                    self.ring()
                elif self._burst is None:
                    self._burst = torch.inference_mode()
                    self._burst.__enter__()
                if up.event is not None:  # only behind an accelerator that learns too: a gradient, short of its copy
                    up.event.synchronize()
                mine.value = work.fn(up.value)
            except (KeyboardInterrupt, SystemExit):
                raise  # they belong to the loop
            except BaseException as cause:  # a CancelledError, too: it would end the stage's task without a word
                mine.error = stage_failed(work, frame, cause)
                recorder.failed += 1
            end = self._ended[work.index] = self._now()
            recorder.add(start, end, frame.index)
        up.value = None
        self._settled(mine)

    def _settled(self, mine: Pending) -> None:
        mine.done = True
        if mine.bell is not None:
            mine.bell.ring()
        if mine.frame is not None or mine.waiter is not None:
            self._completions.deliver(mine)

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None
        self._act(work, up, frame, mine, action)
        return mine

    def _act(self, work: Work, up: Pending, frame: Frame, mine: Pending, action: Callable[[], None]) -> None:
        mine.error = up.error
        work.recorders[0].passed += 1
        if mine.error is None:
            try:
                action()
            except Exception as cause:
                mine.error = stage_failed(work, frame, cause)
        self._settled(mine)

    def ring(self) -> None:
        burst, self._burst = self._burst, None
        if burst is not None:
            burst.__exit__(None, None, None)

    def close(self) -> None:
        self._closed = True

    async def join(self) -> None:
        while self._awaited:  # no workers, but what other devices still owe to the agenda
            self._gone = asyncio.get_running_loop().create_future()
            self.pump()
            if self._awaited:
                await self._gone


class InlineDevice(Device):
    """The event loop's own thread."""

    name = "inline"
    speed_class = "inline"
    may_sleep = False

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> InlineStream:
        if workers != 1:
            raise ConfigurationError(
                f'device "inline" is the loop itself and has one worker, not {workers}; use "cpu:0"'
            )
        return InlineStream(label or self.name, completions, self.clock.now)

    def place(self, module: Any) -> Any:
        return module.to("cpu")

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        with torch.inference_mode():
            return time_calls(fn, value, seconds)

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        return 0.0 if to.on_host else to.transfer_seconds(nbytes, self)
