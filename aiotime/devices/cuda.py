"""``cuda:N``: stages on a GPU. One launcher thread per stage queues work; the device synchronises itself.

    loop ── launch ──▶ job queue ──▶ launcher thread ── Lane ──▶ device streams ── mark ──▶ poller ──▶ loop
                       (worker.py)                                                 (of the last stage)

Why a thread: launching a stage eagerly takes hundreds of microseconds of Python, and user code may wait for the device
without saying so (``.item()``); neither may hold up the loop. A pending value is done when it is *launched*:
its event says when it is there, and only the sink (or a host stage) waits for that.

Stages on one device do not share a stream: kernels of different frames may overlap, and one stage that waits for
the device does not stop the other's launches.

Written for any accelerator of PyTorch: ``AcceleratorDevice("xpu", 0)`` is the same with another name.

Not yet run on a GPU: written from PyTorch's source, its logic tested on a pretended accelerator.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import HOST, NOWHERE, Backend, torch_backend
from aiotime.devices.base import Agenda, Completions, Device, Job, Pending, Work
from aiotime.devices.lane import Lane
from aiotime.devices.links import link
from aiotime.devices.poller import Pace, Poller
from aiotime.devices.staging import map_leaves
from aiotime.devices.worker import Worker, WorkerStream
from aiotime.errors import BrokenError, ConfigurationError
from aiotime.frame import Frame

ROUNDS = 5  # of a measurement
MOST_CALLS = 64  # in one round


class AcceleratorStream(WorkerStream):
    """Launcher threads, each with a lane of its own onto ``accelerator``."""

    def __init__(self, name: str, completions: Completions, accelerator: Accelerator, *, workers: int = 1) -> None:
        super().__init__(name, completions, workers=workers)
        self._accelerator = accelerator
        self._own = threading.local()
        self._paces: list[Pace] = []

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        """As for any stream; the device stands still before and after ``action``."""
        return super().exclusive(work, self._alone(action), frame, last=last)

    def _alone(self, action: Callable[[], None]) -> Callable[[], None]:
        """``action`` on a device that stands still.

        Weights that it replaces are still being read by frames launched before, and their memory would be reused
        by streams that do not wait for those; new weights may have been made on a stream that ours do not wait for.
        """

        def alone() -> None:
            self._accelerator.settle()
            with self._accelerator.backend.on(self._lane().compute):
                action()
            self._accelerator.settle()

        return alone

    async def join(self) -> None:
        await super().join()
        poller = Poller.of(asyncio.get_running_loop())
        while self._paces:
            await poller.forget(self._paces.pop())

    # ------------------------------------------------------------------ called on a launcher thread

    @contextmanager
    def thread_context(self) -> Iterator[None]:
        torch.set_num_threads(1)  # filling a slot must not take cores from CPU stages
        try:
            with torch.inference_mode():
                yield
        finally:
            lane: Lane | None = getattr(self._own, "lane", None)
            if lane is not None:
                lane.close()

    def perform(self, work: Work, up: Pending, mine: Pending, worker: Worker) -> None:
        lane = self._lane()
        lane.before_sleep = worker.announce
        if work.grad:
            with torch.inference_mode(mode=False):
                lane.run(work.fn, up, mine, host_output=work.host_output)
        else:
            lane.run(work.fn, up, mine, host_output=work.host_output)

    def _take(self, worker: Worker, agenda: Agenda) -> Job | None:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is not None:
            lane.before_sleep = worker.announce
            try:
                lane.make_room()  # first, so that the agenda decides with the gradients that have come by then
            except BrokenError:
                pass  # the job is told
        job = super()._take(worker, agenda)
        if job is None or job[4] is None:
            return job
        return *job[:4], self._alone(job[4])

    def _park(self, worker: Worker) -> bool:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is not None:
            lane.retire()
        return super()._park(worker)

    def _lane(self) -> Lane:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:  # with the first job, so that a failure is that job's
            # weights were copied and optimizers made on other streams, which those of the lane do not wait for
            self._accelerator.settle()
            pace = Pace(threading.current_thread().name)
            lane = self._own.lane = Lane(self._accelerator, pace=pace)
            self._paces.append(pace)
        return lane


class AcceleratorDevice(Device):
    """Device ``index`` of the accelerators of ``kind``.

    Args:
        kind: what ``torch.device`` calls it: "cuda", "xpu".
        index: from 0.
        backend: its runtime, if not PyTorch's.

    Raises:
        ConfigurationError: there is no such device; the message says what there is.
    """

    on_host = False
    shares_stream = False

    def __init__(self, kind: str, index: int = 0, *, backend: Backend | None = None) -> None:
        self.name = f"{kind}:{index}"
        self._backend: Backend = backend or _runtime(kind)
        count = self._backend.count()
        if count == 0:
            raise ConfigurationError(
                f'device "{self.name}" cannot be used: {self._backend.absence()}. '
                'Use devices=["cpu:0", "cpu:1"] or leave devices out'
            )
        if not 0 <= index < count:
            present = ", ".join(f'"{kind}:{i}" ({self._backend.describe(i)})' for i in range(count))
            raise ConfigurationError(f'there is no device "{self.name}"; there is {present}')
        self.index = index
        self.speed_class = f"{kind} {self._backend.describe(index)}"
        self._accelerator = Accelerator.of(self._backend, index)

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> AcceleratorStream:
        if self._accelerator.broken:
            raise self._accelerator.fault()
        return AcceleratorStream(label or self.name, completions, self._accelerator, workers=workers)

    def place(self, module: Any) -> Any:
        with self._accelerator.quiet:
            return self._backend.place(module, self.index)

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        """Seconds between two results of a steady stream of calls: launches and kernels overlap as in a pipeline."""
        backend, index = self._backend, self.index
        start, end = backend.new_event(timing=True), backend.new_event(timing=True)

        def timed(calls: int) -> float:
            stream.record_event(start)
            for _ in range(calls):
                fn(value)
            stream.record_event(end)
            stream.synchronize()
            return start.elapsed_time(end) / 1000 / calls

        def bring(leaf: Any) -> Any:
            return leaf if backend.where(leaf) in (index, NOWHERE) else backend.send(leaf, index)

        with self._accelerator.lent("measure") as stream, torch.inference_mode(), backend.on(stream):
            value = map_leaves(bring, value)
            result = fn(value)  # loads kernels, tunes algorithms
            stream.synchronize()
            until = time.perf_counter() + seconds
            once = max(timed(1), 1e-6)
            calls = max(1, min(MOST_CALLS, int(seconds / ROUNDS / once)))
            spent = [timed(calls) for _ in range(3)]
            while time.perf_counter() < until:
                spent.append(timed(calls))
        return median(spent), result

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        if isinstance(to, AcceleratorDevice) and to._backend is self._backend:
            if to.index == self.index:
                return 0.0
            other = to.index
        else:
            other = HOST
        latency, per_byte = link(self._accelerator, other)
        seconds = latency + nbytes * per_byte
        if isinstance(to, AcceleratorDevice) and to._backend is not self._backend:  # through the host
            latency, per_byte = link(to._accelerator, HOST)
            seconds += latency + nbytes * per_byte
        return seconds


class CudaDevice(AcceleratorDevice):
    """A GPU of NVIDIA, or of AMD with PyTorch's ROCm build: ``cuda:N``."""

    def __init__(self, index: int = 0) -> None:
        super().__init__("cuda", index)


def _runtime(kind: str) -> Backend:
    try:
        return torch_backend(kind)
    except (RuntimeError, AttributeError) as error:
        raise ConfigurationError(f"PyTorch has no accelerator called {kind!r}: {error}") from error
