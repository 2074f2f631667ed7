"""``inline``: the event loop itself, for stages of microseconds, where any thread hop would cost more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aiotime.devices.base import Completions, Device, DeviceStream, Pending, Work, passed_over, stage_failed
from aiotime.devices.cpu import time_calls
from aiotime.errors import ClosedError, ConfigurationError
from aiotime.frame import Frame
from aiotime.observe.meter import Recorder

LULL = 50e-6  # seconds between two jobs that are the loop's own doing; why they passed is not asked


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

    def bind(self, work: Work) -> None:
        work.recorders.append(Recorder(work.stage, self.name))
        self._ended[work.index] = self._now()

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None and up.done, "an inline stage is launched on a finished value"
        error = up.error
        if error is None and (frame.cancelled or frame.deadline is not None):
            error = passed_over(frame, self._now)
        if self._closed:
            error = ClosedError(f"device stream {self.name} is closed")
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
                mine.value = work.fn(up.value)
            except (KeyboardInterrupt, SystemExit):
                raise  # they belong to the loop
            except BaseException as cause:  # a CancelledError, too: it would end the stage's task without a word
                mine.error = stage_failed(work, frame, cause)
                recorder.failed += 1
            end = self._ended[work.index] = self._now()
            recorder.add(start, end, frame.index)
        up.value = None
        mine.done = True
        if last:
            self._completions.deliver(mine)
        return mine

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None
        mine.error = up.error
        work.recorders[0].passed += 1
        if mine.error is None:
            try:
                action()
            except Exception as cause:
                mine.error = stage_failed(work, frame, cause)
        mine.done = True
        if last:
            self._completions.deliver(mine)
        return mine

    def ring(self) -> None:
        burst, self._burst = self._burst, None
        if burst is not None:
            burst.__exit__(None, None, None)

    def close(self) -> None:
        self._closed = True

    async def join(self) -> None:
        pass  # no workers


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
