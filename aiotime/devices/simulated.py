"""A device whose work takes a stated time on a virtual clock: schedules and scaling tested to the exact tick.

    clock = VirtualClock()
    devices = [SimulatedDevice(k, seconds=1.0, clock=clock) for k in range(64)]

The clock stands still while anything else can happen on the loop and jumps to the next completion once the
loop has been quiet for `QUIET` turns, so virtual time is exact and no real time is spent waiting.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from aiotime.devices.base import (
    SERVED,
    Agenda,
    Completions,
    Device,
    DeviceStream,
    Job,
    Pending,
    Work,
    passed_over,
    stage_failed,
)
from aiotime.errors import ClosedError, ConfigurationError, StageTimeout
from aiotime.frame import Frame
from aiotime.observe.meter import Recorder

QUIET = 16  # turns of the loop without a launch or completion before virtual time moves

Seconds = float | Callable[[Work, Frame], float]


class VirtualClock:
    """Virtual seconds, shared by the simulated devices of one loop.

    Args:
        auto: advance by itself whenever the loop is quiet; with False only `advance` moves time.
    """

    def __init__(self, *, auto: bool = True) -> None:
        self._now = 0.0
        self._auto = auto
        self._order = count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._quiet = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # on which it pumps at present

    def now(self) -> float:
        """Virtual seconds since the clock was made."""
        return self._now

    def call_at(self, when: float, action: Callable[[], None]) -> None:
        """Run ``action`` on the loop at virtual time ``when``; actions of one instant run in the order given."""
        if self._loop is not None and self._loop.is_closed():
            self._loop = None
            self._heap.clear()  # what was due on a loop that is gone never happens
        heapq.heappush(self._heap, (max(when, self._now), next(self._order), action))
        self.touch()

    async def sleep(self, seconds: float) -> None:
        """Wait for virtual ``seconds``."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.call_at(self._now + seconds, lambda: None if woken.done() else woken.set_result(None))
        await woken

    def touch(self) -> None:
        """Something happened: let the loop settle before time moves."""
        self._quiet = 0
        if self._auto and self._heap and self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._pump)

    def advance(self, seconds: float) -> None:
        """Move time forward by hand, running what falls due; on the loop."""
        until = self._now + seconds
        while self._heap and self._heap[0][0] <= until:
            self._step()
        self._now = until

    def _step(self) -> None:
        when, _, action = heapq.heappop(self._heap)
        self._now = when
        action()

    def _pump(self) -> None:
        if not self._heap or self._loop is None:
            self._loop = None
            return
        self._quiet += 1
        if self._quiet > QUIET:
            self._quiet = 0
            due = self._heap[0][0]
            while self._heap and self._heap[0][0] == due:
                self._step()
        self._loop.call_soon(self._pump)


class SimulatedStream(DeviceStream):
    """Starts jobs in launch order on ``workers`` virtual workers; runs their functions at their virtual end."""

    def __init__(
        self, name: str, completions: Completions, clock: VirtualClock, seconds: Seconds, workers: int
    ) -> None:
        self.name = name
        self._completions = completions
        self._clock = clock
        self._seconds = seconds
        self._free = list(range(workers))
        self._workers = workers
        self._jobs: deque[Job | Agenda] = deque()
        self._works: list[Work] = []
        self._idle_since = [(clock.now(), True)] * workers  # since when, and whether for want of input
        self._closed = False
        self._gone: asyncio.Future[None] = completions.loop.create_future()

    def bind(self, work: Work) -> None:
        self._works.append(work)
        for number in range(self._workers):
            work.recorders.append(Recorder(work.stage, self.name if self._workers == 1 else f"{self.name}/{number}"))

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        return self._queue(work, frame, last, None)

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        return self._queue(work, frame, last, action)

    def post(self, agenda: Agenda, jobs: int) -> bool:
        if self._closed:
            return False
        self._jobs.extend([agenda] * jobs)
        self._clock.touch()
        return True

    def ring(self) -> None:
        if asyncio._get_running_loop() is self._completions.loop:
            self._start_soon()
        else:  # a worker thread of another device settled our upstream
            self._completions.loop.call_soon_threadsafe(self._start_ready)

    def ring_at(self, when: float) -> None:
        self._clock.call_at(when, self._start_ready)

    def close(self) -> None:
        self._closed = True
        self._end_if_done()

    async def join(self) -> None:
        await asyncio.shield(self._gone)

    def _queue(self, work: Work, frame: Frame, last: bool, action: Callable[[], None] | None) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None, "a settled frame is never launched"
        if self._closed:
            mine.error, mine.done = ClosedError(f"device stream {self.name} is closed"), True
            if last:
                self._completions.put(mine)
                self._completions.ring()
            return mine
        self._jobs.append((work, up, frame, mine, action))
        if not up.done:
            up.bell = self
        self._clock.touch()
        return mine

    def _start_soon(self) -> None:
        """An agenda chooses among all that this instant brings, so it is asked after the last completion of it."""
        if self._jobs and not isinstance(self._jobs[0], tuple):
            self._clock.call_at(self._clock.now(), self._start_ready)
        else:
            self._start_ready()

    def _start_ready(self) -> None:
        while self._jobs and self._free:
            head = self._jobs[0]
            job = head if isinstance(head, tuple) else head.take(self)
            if job is None:
                return
            if job is SERVED:
                self._jobs.popleft()
                continue
            work, up, frame, mine, action = job
            if not up.done:
                if up.bell is not self:
                    up.bell = self
                return
            if action is not None and len(self._free) < self._workers:
                return  # it runs alone: wait until every worker is free
            self._jobs.popleft()
            error = up.error or passed_over(frame, self._clock.now)
            if error is not None or action is not None:
                work.recorders[0].passed += 1
            if error is not None:
                mine.error = error
                self._settle(up, mine)
            elif action is not None:
                try:
                    action()
                except Exception as cause:
                    mine.error = stage_failed(work, frame, cause)
                self._settle(up, mine)
            else:
                self._start(work, up, frame, mine)
        self._end_if_done()

    def _start(self, work: Work, up: Pending, frame: Frame, mine: Pending) -> None:
        number = self._free.pop(0)
        start = self._clock.now()
        spent = self._seconds(work, frame) if callable(self._seconds) else self._seconds
        late = work.timeout is not None and spent > work.timeout
        if work.timeout is not None and late:
            spent = work.timeout
        since, for_input = self._idle_since[number]
        for bound in self._works:
            recorder = bound.recorders[number]
            if for_input:
                recorder.idle_input += start - since
            else:
                recorder.idle_output += start - since

        def finish() -> None:
            recorder = work.recorders[number]
            if late:
                mine.error = StageTimeout(
                    f"stage {work.stage!r} took longer than {work.timeout} s at frame {frame.index}",
                    stage=work.stage,
                    frame=frame.index,
                    key=frame.key,
                )
                recorder.failed += 1
            else:
                try:
                    mine.value = work.fn(up.value)
                except (KeyboardInterrupt, SystemExit):
                    raise  # they belong to the loop
                except BaseException as cause:  # a CancelledError, too: the frame would never settle
                    mine.error = stage_failed(work, frame, cause)
                    recorder.failed += 1
            recorder.add(start, self._clock.now(), frame.index)
            self._idle_since[number] = (self._clock.now(), work.starved())
            self._free.append(number)
            self._free.sort()
            self._settle(up, mine)
            self._start_soon()

        self._clock.call_at(start + spent, finish)

    def _settle(self, up: Pending, mine: Pending) -> None:
        up.value = None
        mine.done = True
        self._clock.touch()
        if mine.bell is not None:
            mine.bell.ring()
        if mine.frame is not None or mine.waiter is not None:
            self._completions.deliver(mine)

    def _end_if_done(self) -> None:
        if self._closed and not self._jobs and len(self._free) == self._workers and not self._gone.done():
            self._gone.set_result(None)


class SimulatedDevice(Device):
    """A device that takes ``seconds`` of virtual time per job.

    Args:
        index: the N in its name ``sim:N``.
        seconds: per job, or a function ``(work, frame) -> seconds``; several frames that run as one job are one
            `aiotime.batching.batch.Batch`, with the ``sizes`` of its frames.
        clock: the virtual clock it shares with its neighbours.
    """

    may_sleep = False

    def __init__(self, index: int, *, seconds: Seconds, clock: VirtualClock) -> None:
        if not callable(seconds) and seconds < 0:
            raise ConfigurationError(f"sim:{index} cannot take {seconds} seconds; give a number >= 0")
        self.name = f"sim:{index}"
        self.speed_class = self.name
        self.clock: VirtualClock = clock
        self._seconds = seconds

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> SimulatedStream:
        return SimulatedStream(label or self.name, completions, self.clock, self._seconds, workers)

    def place(self, module: Any) -> Any:
        return module

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        """A simulated device says nothing of real layers: each takes its stated time (1.0 where that varies)."""
        return (1.0 if callable(self._seconds) else self._seconds), fn(value)

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        return 0.0
