"""Where PyTorch's own work is done in the contest: a GPU with streams and graphs, or the CPU standing in for it.

On the CPU streams and events are empty shells: work is over when its call returns. So everything that is written for a
place runs without a GPU too, at toy sizes.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Call = Callable[[], None]


class Place(Protocol):
    """What contenders need of a device."""

    device: torch.device
    devices: list[str]  # what aiotime's stages are given, in turn

    def stream(self, *, priority: int = 0) -> Any:
        """A new stream."""

    def event(self, *, timing: bool = False) -> Any:
        """A new event; its ``synchronize`` spins, as a plain loop would have it."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make ``stream`` current for this thread."""

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Page-locked host memory of the shape of ``like``."""

    def pool(self) -> Any:
        """Memory for graphs that are never replayed at the same time and leave nothing in it."""

    def captured(self, call: Call, stream: Any, *, pool: Any = None) -> Call:
        """``call`` as a graph to be replayed on ``stream``; all its tensors must stay where they are."""

    def synchronize(self) -> None:
        """Block until the device has nothing left to do."""

    def forget(self) -> None:
        """Give cached memory back and count the peak anew."""

    def peak_bytes(self) -> int:
        """Most bytes allocated since `forget`."""


class CudaPlace:
    """The first GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.devices = ["cuda:0"]

    def stream(self, *, priority: int = 0) -> Any:
        """From PyTorch's pool."""
        return torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]

    def event(self, *, timing: bool = False) -> Any:
        """Spins."""
        return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Current for this thread."""
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """From PyTorch's allocator for pinned memory."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def pool(self) -> Any:
        """A pool of PyTorch's allocator."""
        return torch.cuda.graph_pool_handle()

    def captured(self, call: Call, stream: Any, *, pool: Any = None) -> Call:
        """Run it three times, so that libraries are set up and algorithms chosen, then capture it."""
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            call()
        torch.cuda.synchronize()

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        """All streams."""
        torch.cuda.synchronize()

    def forget(self) -> None:
        """Empty the cache."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """By PyTorch's allocator: tensors, graphs' pools, workspaces taken through it."""
        return torch.cuda.max_memory_allocated()


class Shell:
    """A stream or an event of a place where everything is over at once."""

    def record_event(self, event: Any) -> Any:
        """Passed already."""
        return event

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Over."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """No time is kept; a millisecond."""
        return 1.0


class HostPlace:
    """The CPU, at toy sizes."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.devices = ["cpu:0", "cpu:1"]

    def stream(self, *, priority: int = 0) -> Any:
        """An empty shell."""
        return Shell()

    def event(self, *, timing: bool = False) -> Any:
        """An empty shell."""
        return Shell()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Nothing is current."""
        return nullcontext()

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(like.shape, dtype=like.dtype)

    def pool(self) -> Any:
        """None is needed."""

    def captured(self, call: Call, stream: Any, *, pool: Any = None) -> Call:
        """The call itself."""
        return call

    def synchronize(self) -> None:
        """Everything is over."""

    def forget(self) -> None:
        """The process's peak cannot be counted anew."""

    def peak_bytes(self) -> int:
        """Of the whole process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
