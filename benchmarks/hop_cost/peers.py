"""The same chain of functions without aiotime, each as well as it can be written in a screen.

Every one keeps the order, bounds what is in flight, gives each stage a thread of its own with one intra-op thread
in ``torch.inference_mode``, and takes its frames from an async generator where it lives on a loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

Function = Callable[[torch.Tensor], torch.Tensor]
Ahead = asyncio.Future[torch.Tensor]
Peer = Callable[[Sequence[Function], torch.Tensor, int, int], Coroutine[None, None, float]]


async def frames_from(frame: torch.Tensor, number: int) -> AsyncIterator[torch.Tensor]:
    """``number`` times the same frame."""
    for _ in range(number):
        yield frame


def for_loop(functions: Sequence[Function], frame: torch.Tensor, number: int) -> float:
    """Frames per second of plain calls, one after the other."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(number):
            value = frame
            for function in functions:
                value = function(value)
        return number / (time.perf_counter() - start)


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    torch.inference_mode().__enter__()  # for the life of the thread: entering it per call costs a microsecond


async def executor_one_at_a_time(functions: Sequence[Function], frame: torch.Tensor, number: int, depth: int) -> float:
    """One task per stage: get, await run_in_executor, put. What most people write."""

    async def stage(
        pool: ThreadPoolExecutor, fn: Function, inbox: asyncio.Queue[torch.Tensor], outbox: asyncio.Queue[torch.Tensor]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            value = await inbox.get()
            await outbox.put(await loop.run_in_executor(pool, fn, value))

    queues: list[asyncio.Queue[torch.Tensor]] = [asyncio.Queue(depth) for _ in range(len(functions) + 1)]

    async def feed() -> None:
        async for value in frames_from(frame, number):
            await queues[0].put(value)

    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1, initializer=_prepare_thread)) for _ in functions]
        tasks = [
            asyncio.create_task(stage(pool, fn, queues[k], queues[k + 1]))
            for k, (pool, fn) in enumerate(zip(pools, functions, strict=True))
        ]
        start = time.perf_counter()
        tasks.append(asyncio.create_task(feed()))
        for _ in range(number):
            await queues[-1].get()
        spent = time.perf_counter() - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return number / spent


async def executor_futures_in_queues(
    functions: Sequence[Function], frame: torch.Tensor, number: int, depth: int
) -> float:
    """The queues hold futures, so that each stage has up to ``depth`` calls waiting in its executor."""

    async def stage(
        pool: ThreadPoolExecutor, fn: Function, inbox: asyncio.Queue[Ahead], outbox: asyncio.Queue[Ahead]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            value = await (await inbox.get())
            await outbox.put(loop.run_in_executor(pool, fn, value))

    queues: list[asyncio.Queue[Ahead]] = [asyncio.Queue(depth) for _ in range(len(functions) + 1)]

    async def feed() -> None:
        loop = asyncio.get_running_loop()
        async for value in frames_from(frame, number):
            ready: Ahead = loop.create_future()
            ready.set_result(value)
            await queues[0].put(ready)

    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1, initializer=_prepare_thread)) for _ in functions]
        tasks = [
            asyncio.create_task(stage(pool, fn, queues[k], queues[k + 1]))
            for k, (pool, fn) in enumerate(zip(pools, functions, strict=True))
        ]
        start = time.perf_counter()
        tasks.append(asyncio.create_task(feed()))
        for _ in range(number):
            await (await queues[-1].get())
        spent = time.perf_counter() - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return number / spent


def threads_and_queues(functions: Sequence[Function], frame: torch.Tensor, number: int, depth: int) -> float:
    """No loop at all: a feeding thread, one thread per stage, bounded queues between them."""
    queues: list[queue.Queue[torch.Tensor | None]] = [queue.Queue(depth) for _ in range(len(functions) + 1)]

    def feed() -> None:
        for _ in range(number):
            queues[0].put(frame)
        queues[0].put(None)

    def stage(fn: Function, inbox: queue.Queue[torch.Tensor | None], outbox: queue.Queue[torch.Tensor | None]) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (value := inbox.get()) is not None:
                outbox.put(fn(value))
            outbox.put(None)

    threads = [threading.Thread(target=feed)]
    threads += [threading.Thread(target=stage, args=(fn, queues[k], queues[k + 1])) for k, fn in enumerate(functions)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    while queues[-1].get() is not None:
        pass
    spent = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return number / spent
