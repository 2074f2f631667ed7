"""The contract of a contender, and the loop that those on asyncio share."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import torch

from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Work

T = TypeVar("T")


class CannotError(Exception):
    """This contender cannot do this work here; the message is the reason that the table shows."""


class Contender(ABC):
    """One way to do a work, alive in a process of its own from `open` to `close`.

    `run` is called many times in between. It sends every frame of the feed through the stages and hands the outputs to
    the sink, in order, each as soon as it is there. Between calls nothing may run.
    """

    @abstractmethod
    def open(self, work: Work) -> None:
        """Build everything that outlives a run."""

    @abstractmethod
    def run(self, feed: Feed, sink: Sink) -> None:
        """All frames of ``feed``; returns when ``sink`` has every output. Raises what a stage raised."""

    @abstractmethod
    def close(self) -> None:
        """End what `open` began."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """What was learned, by the names of the whole model."""
        raise CannotError("it does not learn")


class OnLoop(Contender):
    """A contender that lives on one event loop, uvloop where there is one; the loop stands still between runs."""

    def open(self, work: Work) -> None:
        """Make the loop, and build on it."""
        self._runner = asyncio.Runner(loop_factory=_loop_factory())
        self._do(self.enter(work))

    def run(self, feed: Feed, sink: Sink) -> None:
        """The loop runs as long as the stream."""
        self._do(self.stream(feed, sink))

    def close(self) -> None:
        """Take down, and end the loop."""
        self._do(self.leave())
        self._runner.close()

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    @abstractmethod
    async def enter(self, work: Work) -> None:
        """Build, on the loop."""

    @abstractmethod
    async def stream(self, feed: Feed, sink: Sink) -> None:
        """One run, on the loop."""

    async def leave(self) -> None:
        """Take down, on the loop."""


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def stage_thread() -> None:
    """How a thread that runs stages begins: one intra-op thread, inference mode for its whole life."""
    torch.set_num_threads(1)
    torch.inference_mode().__enter__()  # entering it anew for every frame would cost a microsecond
