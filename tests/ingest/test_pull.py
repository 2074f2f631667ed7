"""Tests of aiotime.ingest.pull: every kind of source, closed where it was opened, pulled no further than permitted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from aiotime.errors import ConfigurationError
from aiotime.ingest import pull as pull_module
from aiotime.ingest.pull import ThreadPuller, pull

if TYPE_CHECKING:
    from tests.conftest import Settle


async def drawn(source: Any, *, room: int = 4) -> list[Any]:
    iterator = pull(source, room=lambda: room)
    got = [item async for item in iterator]
    await closed(iterator)
    return got


async def closed(iterator: Any) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()


class Counting:
    """An iterable (not a generator) that counts how far it was pulled, and on which threads."""

    def __init__(self, items: int = 10**9) -> None:
        self.items = items
        self.pulled = 0
        self.threads: set[threading.Thread] = set()

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> int:
        self.threads.add(threading.current_thread())
        if self.pulled >= self.items:
            raise StopIteration
        self.pulled += 1
        return self.pulled - 1


async def count_to_three() -> AsyncIterator[int]:
    for i in range(3):
        yield i


def three_blocking() -> Iterator[int]:
    yield from range(3)


class AsyncThree:
    def __aiter__(self) -> AsyncIterator[int]:
        return count_to_three()


def calls(*, asynchronous: bool) -> Callable[[], Any]:
    """A function to be called for each frame; it ends by StopIteration or StopAsyncIteration."""
    items = iter(range(3))

    async def each() -> int:
        try:
            return next(items)
        except StopIteration:
            raise StopAsyncIteration from None

    return each if asynchronous else lambda: next(items)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: [0, 1, 2], id="list"),
        pytest.param(lambda: (0, 1, 2), id="tuple"),
        pytest.param(lambda: range(3), id="range"),
        pytest.param(lambda: torch.arange(3), id="tensor"),
        pytest.param(lambda: np.arange(3), id="array"),
        pytest.param(lambda: count_to_three(), id="async generator"),
        pytest.param(lambda: count_to_three, id="async generator function"),
        pytest.param(lambda: AsyncThree(), id="async iterable"),
        pytest.param(lambda: three_blocking(), id="generator"),
        pytest.param(lambda: three_blocking, id="generator function"),
        pytest.param(lambda: Counting(3), id="iterable"),
        pytest.param(lambda: {0: "a", 1: "b", 2: "c"}.keys(), id="view"),
        pytest.param(lambda: calls(asynchronous=False), id="callable"),
        pytest.param(lambda: calls(asynchronous=True), id="async callable"),
        pytest.param(lambda: torch.utils.data.DataLoader(range(3), batch_size=None), id="DataLoader"),  # type: ignore[arg-type]
    ],
)
async def test_every_kind_of_source(source: Callable[[], Any]) -> None:
    """Each kind of source gives its items, in order, and ends."""
    assert [int(item) for item in await drawn(source())] == [0, 1, 2]


@pytest.mark.asyncio
async def test_an_aiostream_stream_is_opened_and_closed() -> None:
    """An aiostream stream is iterated inside its own context, which ends with the run."""
    stream = pytest.importorskip("aiostream.stream")
    events: list[str] = []

    async def camera() -> AsyncIterator[int]:
        try:
            for i in range(100):
                yield i
        finally:
            events.append("closed")

    iterator = pull(stream.iterate(camera()), room=lambda: 1)
    assert [await anext(iterator) for _ in range(2)] == [0, 1]
    await closed(iterator)
    assert events == ["closed"]


@pytest.mark.parametrize("source", ["clip.mp4", b"bytes", {"a": 1}, 3, None])
def test_what_is_no_source(source: Any) -> None:
    """Things that only look like sources are refused with what would do."""
    with pytest.raises(ConfigurationError, match=f"a {type(source).__name__} is not a source; hand in"):
        pull(source, room=lambda: 1)


# ------------------------------------------------------------------------------------------- blocking sources


@pytest.mark.asyncio
async def test_a_thread_pulls_no_further_than_permitted(settle: Settle) -> None:
    """A blocking source is asked for what there is room for, and for one frame where there is none."""
    source = Counting()
    room = 3
    iterator = pull(source, room=lambda: room)
    for i in range(20):
        assert await anext(iterator) == i
        await settle()
        assert source.pulled <= i + 1 + room
    assert source.pulled > 20
    room = 0
    for i in range(20, 30):
        assert await anext(iterator) == i
    await settle()
    assert source.pulled == 30
    await closed(iterator)
    assert source.pulled == 30
    assert threading.current_thread() not in source.threads


@pytest.mark.asyncio
async def test_a_generator_is_closed_on_its_own_thread() -> None:
    """A generator's ``finally`` runs on the thread that ran its body, before aclose returns."""
    threads: list[threading.Thread] = []

    def camera() -> Iterator[int]:
        try:
            threads.append(threading.current_thread())
            while True:
                yield 1
        finally:
            threads.append(threading.current_thread())

    iterator = pull(camera(), room=lambda: 1)
    await anext(iterator)
    await closed(iterator)
    assert len(threads) == 2
    assert threads[0] is threads[1] is not threading.current_thread()
    assert not threads[0].is_alive()


@pytest.mark.asyncio
async def test_a_source_that_blocks_for_ever_does_not_hold_up_closing(
    monkeypatch: pytest.MonkeyPatch, settle: Settle
) -> None:
    """aclose gives a source inside next() a while, then leaves it; its late item goes nowhere."""
    monkeypatch.setattr(pull_module, "PATIENCE", 0.01)
    gate, inside = threading.Event(), threading.Event()

    def stuck() -> Iterator[int]:
        yield 0
        inside.set()
        gate.wait()
        yield 1

    iterator = pull(stuck(), room=lambda: 2)
    assert isinstance(iterator, ThreadPuller)
    assert await anext(iterator) == 0
    waiting = asyncio.create_task(anext(iterator))
    await settle(until=inside.is_set)
    waiting.cancel()
    await asyncio.wait([waiting])
    await iterator.aclose()
    thread = iterator._thread
    assert thread is not None
    assert thread.is_alive()
    assert thread.daemon
    gate.set()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


@pytest.mark.asyncio
async def test_errors_of_a_blocking_source_come_after_its_items() -> None:
    """What a blocking source raises is raised where its next item would have been, once."""

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("camera unplugged")

    iterator = pull(broken(), room=lambda: 9)
    assert await anext(iterator) == 1
    with pytest.raises(OSError, match="unplugged"):
        await anext(iterator)
    with pytest.raises(StopAsyncIteration):
        await anext(iterator)
    await closed(iterator)


@pytest.mark.asyncio
async def test_errors_while_closing_do_not_get_lost() -> None:
    """A generator whose cleaning up fails ends its stream with that error."""

    def camera() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise OSError("cannot release")

    iterator = pull(camera(), room=lambda: 5)
    got = []
    with pytest.raises(OSError, match="release"):
        async for item in iterator:
            got.append(item)  # noqa: PERF401 - what came before the error matters
    assert got == [1, 2]


@pytest.mark.asyncio
async def test_an_iterable_that_cannot_begin() -> None:
    """An error of ``iter()`` itself is raised at the first item."""

    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no such camera")

    iterator = pull(Broken(), room=lambda: 1)
    with pytest.raises(OSError, match="no such camera"):
        await anext(iterator)


@pytest.mark.asyncio
async def test_closing_before_the_first_item_starts_no_thread() -> None:
    """A blocking source that was never asked for anything is not touched."""
    source = Counting()
    iterator = pull(source, room=lambda: 1)
    await closed(iterator)
    with pytest.raises(StopAsyncIteration):
        await anext(iterator)
    assert source.pulled == 0


@pytest.mark.asyncio
async def test_a_cancelled_wait_loses_no_item() -> None:
    """Whoever is cancelled while waiting for a blocking source leaves its item to the next who asks."""
    gate = threading.Semaphore(0)

    def gated() -> Iterator[int]:
        for i in range(3):
            gate.acquire()
            yield i

    iterator = pull(gated(), room=lambda: 1)
    waiting = asyncio.ensure_future(anext(iterator))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    for _ in range(3):
        gate.release()
    assert [item async for item in iterator] == [0, 1, 2]


@pytest.mark.asyncio
async def test_async_iterables_are_closed() -> None:
    """An async iterable's iterator is closed with the pull, in the middle too."""
    events: list[str] = []

    class Camera:
        async def __aiter__(self) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                events.append("closed")

    iterator = pull(Camera(), room=lambda: 1)
    await anext(iterator)
    with contextlib.suppress(StopAsyncIteration):
        await closed(iterator)
    assert events == ["closed"]
