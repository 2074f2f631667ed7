"""Every way to hear, in a task on the loop, that the GPU has finished.

    arm(number)    queued behind the work, on the launching thread
    wait(number)   until the task goes on

A way is opened on a running loop, used for one frame after the other, and closed there.
"""

from __future__ import annotations

import asyncio
import os
import threading
from abc import ABC, abstractmethod
from queue import SimpleQueue
from typing import Any

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.marks import Mark
from aiotime.devices.poller import Pace, Poller
from benchmarks.gpu.hostcalls import Doorbell, Semaphore
from benchmarks.gpu.runtime import Runtime


class Way(ABC):
    """One way to wait.

    Args:
        runtime: whose events are waited for.
        stream: on which the work is.
        frames: that will come, at most.
    """

    name: str
    parks = True  # the core is free while it waits

    def __init__(self, runtime: Runtime, stream: Any, frames: int) -> None:
        self.runtime = runtime
        self.stream = stream
        self.frames = frames

    def open(self) -> None:
        """On the loop, before the first frame."""
        self.loop = asyncio.get_running_loop()

    @abstractmethod
    def arm(self, number: int) -> None:
        """Queue what will tell of frame ``number`` (from 1)."""

    @abstractmethod
    async def wait(self, number: int) -> None:
        """Until frame ``number`` is known to be done."""

    async def close(self) -> None:  # noqa: B027 - most ways leave nothing behind
        """On the loop, after the last frame."""


class Polling(Way):
    """Ask an event at every turn of the loop."""

    name = "sleep(0) + query"
    parks = False
    nap = 0.0

    def open(self) -> None:
        """One event is enough: one frame is under way at a time."""
        super().open()
        self.event = self.runtime.event()

    def arm(self, number: int) -> None:
        """Record."""
        self.stream.record_event(self.event)

    async def wait(self, number: int) -> None:
        """Ask and yield."""
        while not self.event.query():  # noqa: ASYNC110 - this is what is measured
            await asyncio.sleep(self.nap)


class SlowPolling(Polling):
    """Ask an event every millisecond."""

    name = "sleep(1 ms) + query"
    parks = True
    nap = 0.001


class ByPoller(Way):
    """aiotime's ladder as it stands, with a mark and a pace as a stage has them."""

    name = "aiotime's poller"

    def open(self) -> None:
        """A pool of events and a pace."""
        super().open()
        self._accelerator = Accelerator.of(self.runtime.backend, 0)
        self._pace = Pace("measured")
        self._poller = Poller.of(self.loop)

    def arm(self, number: int) -> None:
        """A mark."""
        self._mark = Mark(self._accelerator, self.stream, pace=self._pace)

    async def wait(self, number: int) -> None:
        """Watch it."""
        future = self.loop.create_future()

        def told(error: BaseException | None) -> None:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self._poller.watch(self._mark, told)
        await future

    async def close(self) -> None:
        """End its waiter."""
        await self._poller.forget(self._pace)


class Told(Way):
    """A thread waits and wakes the loop; subclasses say how it waits."""

    by_eventfd = False

    def open(self) -> None:
        """Start the thread."""
        super().open()
        self._future: asyncio.Future[None] = self.loop.create_future()
        self._jobs: SimpleQueue[int | None] = SimpleQueue()
        self._fd = -1
        if self.by_eventfd:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.loop.add_reader(self._fd, self._rung)
        self.prepare()
        self._thread = threading.Thread(target=self._work, name=f"waiter: {self.name}")
        self._thread.start()

    def prepare(self) -> None:
        """What the thread will wait for."""

    @abstractmethod
    def block(self) -> None:
        """Wait for the newest frame; on the thread."""

    def _work(self) -> None:
        while self._jobs.get() is not None:
            self.block()
            if self.by_eventfd:
                os.eventfd_write(self._fd, 1)
            else:
                self.loop.call_soon_threadsafe(self._settle)

    def _rung(self) -> None:
        os.eventfd_read(self._fd)
        self._settle()

    def _settle(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, number: int) -> None:
        """Hand the frame to the thread and sleep."""
        self._future = self.loop.create_future()
        self._jobs.put(number)
        await self._future

    async def close(self) -> None:
        """End the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        if self.by_eventfd:
            self.loop.remove_reader(self._fd)
            os.close(self._fd)


class BlockingEvent(Told):
    """A thread in ``synchronize()`` of an event that sleeps."""

    name = "thread, blocking event"
    blocking = True

    def prepare(self) -> None:
        """One event."""
        self.event = self.runtime.event(blocking=self.blocking)

    def arm(self, number: int) -> None:
        """Record."""
        self.stream.record_event(self.event)

    def block(self) -> None:
        """In the driver, without the GIL."""
        self.event.synchronize()


class BlockingEventFd(BlockingEvent):
    """The same, but the loop is woken through an eventfd."""

    name = "thread, blocking event, eventfd"
    by_eventfd = True


class SpinningEvent(BlockingEvent):
    """The same with PyTorch's usual event: the driver spins."""

    name = "thread, spinning event"
    parks = False
    blocking = False


class NativePost(Told):
    """The GPU posts a semaphore by a native host function; a thread sleeps on it."""

    name = "host function sem_post, thread"

    def prepare(self) -> None:
        """A semaphore."""
        self._semaphore = Semaphore()

    def arm(self, number: int) -> None:
        """Queue ``sem_post``."""
        self.runtime.call_host(self.stream, Semaphore.function, self._semaphore.argument)

    def block(self) -> None:
        """In ``sem_wait``, without the GIL."""
        self._semaphore.wait()

    async def close(self) -> None:
        """Nobody posts any more: every frame was waited for."""
        await super().close()
        self._semaphore.close()


class NativeBell(Way):
    """The GPU writes into a pipe that the loop watches, by a native host function: no thread of ours at all."""

    name = "host function fflush, pipe"

    def open(self) -> None:
        """The pipe."""
        super().open()
        self._bell = Doorbell()
        self._rung = 0
        self._future: asyncio.Future[None] = self.loop.create_future()
        self.loop.add_reader(self._bell.reader, self._ring)

    def arm(self, number: int) -> None:
        """Put a byte ready and queue ``fflush``."""
        self._bell.load()
        self.runtime.call_host(self.stream, Doorbell.function, self._bell.argument)

    def _ring(self) -> None:
        self._rung += self._bell.take()
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, number: int) -> None:
        """Until so many bytes have come."""
        while self._rung < number:
            self._future = self.loop.create_future()
            await self._future

    async def close(self) -> None:
        """Close the pipe."""
        self.loop.remove_reader(self._bell.reader)
        self._bell.close()


class PinnedWord(Way):
    """Read a number in pinned memory at every turn of the loop: no call into the driver."""

    name = "sleep(0) + pinned counter"
    parks = False

    def open(self) -> None:
        """The counter."""
        super().open()
        self._counter = self.runtime.counter(self.frames + 1)

    def arm(self, number: int) -> None:
        """Queue the copy."""
        self._counter.arm(self.stream, number)

    async def wait(self, number: int) -> None:
        """Read and yield."""
        while self._counter.read() < number:  # noqa: ASYNC110 - this is what is measured
            await asyncio.sleep(0)


WAYS: tuple[type[Way], ...] = (
    Polling,
    SlowPolling,
    ByPoller,
    BlockingEvent,
    BlockingEventFd,
    SpinningEvent,
    PinnedWord,
    NativePost,
    NativeBell,
)
