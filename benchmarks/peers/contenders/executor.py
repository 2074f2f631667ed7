"""asyncio as it comes: a task per stage, queues between them, an executor of one thread per stage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.contenders.contender import OnLoop, stage_thread
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

ROOM = 64  # frames that a queue holds
Queue = asyncio.Queue[Awaitable[Any]]


class Executor(OnLoop):
    """The queues hold futures, so that up to 64 calls wait in each executor: faster than awaiting call by call."""

    async def enter(self, work: Work) -> None:
        """Queues, executors and tasks."""
        self._queues: list[Queue] = [asyncio.Queue(ROOM) for _ in range(len(work.stages) + 1)]
        self._pools = [ThreadPoolExecutor(1, initializer=stage_thread) for _ in work.stages]
        self._tasks = [
            asyncio.create_task(self._stage(pool, part, *self._queues[index : index + 2]), name=f"stage {index}")
            for index, (pool, part) in enumerate(zip(self._pools, work.stages, strict=True))
        ]

    async def _stage(self, pool: ThreadPoolExecutor, part: Part, inbox: Queue, outbox: Queue) -> None:
        loop = asyncio.get_running_loop()
        while True:
            coming = await inbox.get()
            try:
                value = await coming
            except Exception:  # noqa: BLE001 - the future keeps it, and is handed on
                await outbox.put(coming)
                continue
            await outbox.put(loop.run_in_executor(pool, part, value))

    async def stream(self, feed: Feed, sink: Sink) -> None:
        """One task sends, this one takes."""

        async def send() -> None:
            loop = asyncio.get_running_loop()
            async for frame in feed:
                here: asyncio.Future[Any] = loop.create_future()
                here.set_result(frame)
                await self._queues[0].put(here)

        sending = asyncio.create_task(send(), name="send")
        for _ in range(feed.number):
            sink.take(await (await self._queues[-1].get()))
        await sending

    async def leave(self) -> None:
        """End tasks and threads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in self._pools:
            pool.shutdown()
