"""aiostream: one ordered map per stage."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.contenders.contender import OnLoop, stage_thread
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

AHEAD = 8  # calls of a stage that wait for its thread


class Aiostream(OnLoop):
    """``stream.iterate(source) | pipe.map(call, ordered=True, task_limit=8) | …``, each on a thread of its own."""

    async def enter(self, work: Work) -> None:
        """Threads outlive a run; streams are made anew."""
        self._stream: Any = importlib.import_module("aiostream").stream
        self._pools = [ThreadPoolExecutor(1, initializer=stage_thread) for _ in work.stages]
        self._calls = [_call(part, pool) for part, pool in zip(work.stages, self._pools, strict=True)]

    async def stream(self, feed: Feed, sink: Sink) -> None:
        """Maps behind each other."""
        made = self._stream.iterate(feed)
        for call in self._calls:
            made = self._stream.map(made, call, ordered=True, task_limit=AHEAD)
        async with made.stream() as outputs:
            async for output in outputs:
                sink.take(output)

    async def leave(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown()


def _call(part: Part, pool: ThreadPoolExecutor) -> Callable[[Any], Awaitable[Any]]:
    async def call(value: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, part, value)

    return call
