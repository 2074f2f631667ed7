"""Any source as one async iterator that is closed when the run ends.

async iterable, aiostream stream      iterated on the loop
list, tuple, range, tensor, array     iterated on the loop (they cannot block)
any other iterable                    pulled on a thread of its own
callable                              called for each frame, on a thread; StopIteration ends the stream
async callable                        awaited for each frame; StopAsyncIteration ends the stream
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.ingest.inspection import is_array

PATIENCE = 2.0  # seconds that closing waits for a source that blocks inside next()

_IN_MEMORY = (list, tuple, range, deque, torch.Tensor)


def pull(source: Any, *, room: Callable[[], int]) -> AsyncIterator[Any]:
    """An async iterator over ``source``.

    Args:
        source: see the module's table.
        room: how many frames the pipeline would take right now; a thread pulls at most that far ahead.

    Raises:
        ConfigurationError: not something frames can be pulled from.
    """
    if inspect.isasyncgenfunction(source) or inspect.isgeneratorfunction(source):
        source = source()
    if isinstance(source, str | bytes | dict):
        raise ConfigurationError(
            f"a {type(source).__name__} is not a source; hand in an (async) iterable of frames or a function that "
            "returns the next frame (for files and cameras see aiotime.sources)"
        )
    if inspect.isasyncgen(source):
        return source
    if hasattr(source, "__aiter__"):
        return _from_async(source)
    if isinstance(source, _IN_MEMORY) or is_array(source):
        return _from_memory(iter(source))
    if hasattr(source, "__iter__"):
        return ThreadPuller(lambda: iter(source), room)
    if inspect.iscoroutinefunction(source) or inspect.iscoroutinefunction(getattr(source, "__call__", None)):  # noqa: B004
        return _from_async_calls(source)
    if callable(source):
        return ThreadPuller(lambda: _calls(source), room)
    raise ConfigurationError(
        f"a {type(source).__name__} is not a source; hand in an async iterable, an iterable or a callable of frames"
    )


async def _from_async(source: Any) -> AsyncIterator[Any]:
    opened = source.stream() if callable(getattr(source, "stream", None)) else None
    if isinstance(opened, AbstractAsyncContextManager):  # an aiostream stream wants to be opened
        async with opened as streamer:
            async for item in streamer:
                yield item
        return
    iterator = aiter(source)
    try:
        async for item in iterator:
            yield item
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def _from_memory(iterator: Iterator[Any]) -> AsyncIterator[Any]:
    for item in iterator:
        yield item


async def _from_async_calls(source: Callable[[], Any]) -> AsyncIterator[Any]:
    while True:
        try:
            item = await source()
        except StopAsyncIteration:
            return
        yield item


class _calls:  # noqa: N801 - reads as the generator it stands for
    """iter() over a callable that ends by raising StopIteration (a generator would turn that into RuntimeError)."""

    def __init__(self, source: Callable[[], Any]) -> None:
        self._source = source

    def __iter__(self) -> _calls:
        return self

    def __next__(self) -> Any:
        return self._source()


class ThreadPuller:
    """A blocking iterator, advanced on a thread of its own, no further than it was permitted to.

    The thread is a daemon: nothing can interrupt a source that blocks for ever inside ``next()``, and
    such a source must not keep the process alive. Closing waits `PATIENCE` seconds for it.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]], room: Callable[[], int]) -> None:
        self._begin = begin
        self._room = room
        self._loop: asyncio.AbstractEventLoop | None = None
        self._items: deque[Any] = deque()
        self._permits = 0
        self._wanted = threading.Semaphore(0)
        self._sleeper: asyncio.Future[None] | None = None
        self._armed = False
        self._closing = False
        self._ended = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._gone: asyncio.Future[None] | None = None

    def __aiter__(self) -> ThreadPuller:
        return self

    async def __anext__(self) -> Any:
        if self._thread is None:
            if self._closing:
                raise StopAsyncIteration
            self._loop = asyncio.get_running_loop()
            self._gone = self._loop.create_future()
            self._thread = threading.Thread(target=self._pull, name="aiotime-source", daemon=True)
            self._thread.start()
        while True:
            if self._items:
                self._permits -= 1
                return self._items.popleft()
            if self._ended:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                raise StopAsyncIteration
            missing = max(1, self._room()) - self._permits
            if missing > 0:
                self._permits += missing
                self._wanted.release(missing)
            assert self._loop is not None
            self._sleeper = self._loop.create_future()
            if self._items or self._ended:
                continue
            await self._sleeper

    async def aclose(self) -> None:
        """Stop pulling; the iterator is closed on its own thread. Waits for it, but not for ever."""
        self._closing = True
        if self._thread is None or self._gone is None:
            return
        self._wanted.release()
        await asyncio.wait([self._gone], timeout=PATIENCE)
        # its last few instructions; join() would block the loop
        while self._gone.done() and self._thread.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(0)

    def _pull(self) -> None:
        iterator: Iterator[Any] | None = None
        try:
            iterator = self._begin()
            while True:
                self._wanted.acquire()
                if self._closing:
                    break
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                self._items.append(item)
                del item
                self._wake()
        except BaseException as error:  # noqa: BLE001 - raised from the loop's side
            self._error = error
        finally:
            close = getattr(iterator, "close", None)
            if close is not None and inspect.isgenerator(iterator):
                try:
                    close()
                except BaseException as error:  # noqa: BLE001 - raised from the loop's side
                    self._error = self._error or error
            self._ended = True
            self._wake()
            self._call_soon(self._mark_gone)

    def _wake(self) -> None:
        if not self._armed:
            self._armed = True
            self._call_soon(self._woken)

    def _woken(self) -> None:
        self._armed = False  # before the sleeper looks, or an item in between is never announced
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def _mark_gone(self) -> None:
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            pass  # the loop is closed
