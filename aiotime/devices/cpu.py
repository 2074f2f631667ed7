"""``cpu:N``: a worker thread of its own with its own number of intra-op threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch

from aiotime.devices.base import Completions, Device, DeviceStream, Pending, Work
from aiotime.devices.worker import Worker, WorkerStream
from aiotime.errors import ConfigurationError


class CpuStream(WorkerStream):
    """Worker threads that run jobs eagerly in ``torch.inference_mode`` (unless the work wants autograd)."""

    direct = True

    def __init__(self, name: str, completions: Completions, *, workers: int, threads: int) -> None:
        super().__init__(name, completions, workers=workers)
        self._threads = threads

    def thread_context(self) -> AbstractContextManager[Any]:
        return _on_threads(self._threads)

    def can_lend_to(self, other: DeviceStream) -> bool:
        return (
            isinstance(other, CpuStream)
            and self.workers == other.workers == 1
            and self._threads == other._threads
            and self is not other
        )

    def perform(self, work: Work, up: Pending, mine: Pending, worker: Worker) -> None:
        if work.grad:
            with torch.inference_mode(mode=False):
                super().perform(work, up, mine, worker)
        else:
            super().perform(work, up, mine, worker)


class CpuDevice(Device):
    """One CPU worker.

    Args:
        index: the N of ``cpu:N``; names the worker, does not pin it to a core.
        threads: intra-op threads each of its workers uses (``torch.set_num_threads`` is per thread).
    """

    def __init__(self, index: int = 0, *, threads: int = 1) -> None:
        if threads < 1:
            raise ConfigurationError(f"cpu:{index} needs at least one intra-op thread, got threads={threads}")
        self.name = f"cpu:{index}"
        self.index = index
        self.threads = threads
        self.speed_class = f"cpu×{threads}"

    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> CpuStream:
        return CpuStream(label or self.name, completions, workers=workers, threads=self.threads)

    def place(self, module: Any) -> Any:
        return module.to("cpu")

    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        outcome: list[tuple[float, Any] | BaseException] = []

        def timed() -> None:
            try:
                with _on_threads(self.threads):
                    outcome.append(time_calls(fn, value, seconds))
            except BaseException as error:  # handed to the caller's thread below
                outcome.append(error)

        thread = threading.Thread(target=timed, name=f"measure:{self.name}")
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        return 0.0 if to.on_host else to.transfer_seconds(nbytes, self)


def time_calls(fn: Callable[[Any], Any], value: Any, seconds: float) -> tuple[float, Any]:
    """Median seconds of ``fn(value)`` over about ``seconds`` of calls after one warm-up, and its result."""
    result = fn(value)
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while len(spent) < 3 or (time.perf_counter() < until and len(spent) < 1000):
        start = time.perf_counter()
        result = fn(value)
        spent.append(time.perf_counter() - start)
    return median(spent), result


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        yield
