"""The few things the wake-up and cost measurements ask of a GPU; on CUDA here, on threads in `dry`.

Streams and events are those of the runtime: ``stream.record_event(event)``, ``event.query()``, ``event.synchronize()``.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from aiotime.devices.backend import torch_backend
from benchmarks.gpu.hostcalls import Launcher


class Counter(Protocol):
    """A number in pinned memory that the device raises when it gets there."""

    def arm(self, stream: Any, number: int) -> None:
        """Queue: the counter becomes ``number``."""

    def read(self) -> int:
        """What it is now: plain memory, no driver."""


class Runtime(Protocol):
    """A GPU, or threads that behave like one."""

    name: str
    backend: Any  # what `aiotime.devices.accelerator.Accelerator` is made on

    def stream(self, *, priority: int = 0) -> Any:
        """A new stream."""

    def event(self, *, timing: bool = False, blocking: bool = False) -> Any:
        """A new event; ``blocking``: its ``synchronize`` sleeps."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make ``stream`` current for this thread."""

    def spin(self, stream: Any, seconds: float) -> None:
        """Keep ``stream`` busy for about so long; returns at once."""

    def tiny(self, stream: Any) -> None:
        """One kernel that does next to nothing."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds on the device between two timing events that have passed."""

    def counter(self, capacity: int) -> Counter:
        """A pinned counter for numbers below ``capacity``."""

    def call_host(self, stream: Any, function: int, argument: int) -> None:
        """Queue a native function of one pointer."""

    def replayed(self, stream: Any, kernels: int) -> Any:
        """A call that launches a captured graph of so many tiny kernels."""

    def synchronize(self) -> None:
        """Block until nothing is left to do."""

    def close(self) -> None:
        """End what was started."""


class PinnedCounter:
    """Numbers lie ready on the device; a copy of eight bytes behind the work brings one over."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        ramp = torch.arange(capacity, device=device)
        self._numbers = list(ramp.unbind())
        self._pinned = torch.zeros((), dtype=torch.int64, pin_memory=True)
        self._word = ctypes.c_int64.from_address(self._pinned.data_ptr())

    def arm(self, stream: Any, number: int) -> None:
        """Queue the copy on ``stream``."""
        with torch.cuda.stream(stream):
            self._pinned.copy_(self._numbers[number], non_blocking=True)

    def read(self) -> int:
        """Eight bytes of the host's memory."""
        return self._word.value


class CudaRuntime:
    """The first GPU."""

    name = "cuda"

    def __init__(self) -> None:
        self.backend: Any = torch_backend("cuda")
        self.device = torch.device("cuda", 0)
        self._cell = torch.zeros(1, device=self.device)
        self._launch = Launcher()
        self.host_launcher = self._launch.name
        torch.cuda.synchronize()
        self.cycles_per_second = self._calibrated()

    def _calibrated(self) -> float:
        """Cycles of `torch.cuda._sleep` in a second, by events, once the clocks have risen."""
        found = 1e9
        for cycles in (200_000_000, 2_000_000, 20_000_000):  # the first wakes the GPU; the last counts
            start, end = self.event(timing=True), self.event(timing=True)
            start.record()
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            end.record()
            end.synchronize()
            found = cycles / (start.elapsed_time(end) / 1000)
        return found

    def stream(self, *, priority: int = 0) -> Any:
        """One of PyTorch's 32 per priority; they are handed out in turn."""
        return torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    def event(self, *, timing: bool = False, blocking: bool = False) -> Any:
        """An event; the driver makes it at its first record."""
        return torch.cuda.Event(enable_timing=timing, blocking=blocking)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Current for this thread."""
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def spin(self, stream: Any, seconds: float) -> None:
        """One thread of the GPU counts cycles."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(max(1, int(seconds * self.cycles_per_second)))  # type: ignore[no-untyped-call]

    def tiny(self, stream: Any) -> None:
        """Add one to one number."""
        with torch.cuda.stream(stream):
            self._cell.add_(1)

    def elapsed(self, start: Any, end: Any) -> float:
        """By the device's clock, half a microsecond fine."""
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000

    def counter(self, capacity: int) -> Counter:
        """Copies of eight bytes."""
        return PinnedCounter(self.device, capacity)

    def call_host(self, stream: Any, function: int, argument: int) -> None:
        """By ``cudaLaunchHostFunc``."""
        self._launch(stream.cuda_stream, function, argument)

    def replayed(self, stream: Any, kernels: int) -> Any:
        """A captured row of `tiny`."""
        cell = torch.zeros(1, device=self.device).add_(1)  # the kernel is loaded now; it could not be in the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(kernels):
                cell.add_(1)

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        replay.cell = cell  # type: ignore[attr-defined]  # its memory is written by every replay
        return replay

    def synchronize(self) -> None:
        """The whole device."""
        torch.cuda.synchronize()

    def close(self) -> None:
        """Nothing was started."""
        torch.cuda.synchronize()
