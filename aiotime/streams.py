"""Streams in and out of a pipeline: infer as a step of an aiostream pipe, several sources as one, a stated rate.

    stream.iterate(source) | streams.infer(pipeline) | pipe.take(10)
    pipeline.run(streams.merge(left=camera, right=camera))
    pipeline.run(streams.pace(source, rate=30.0))

`merge` and `pace` are plain asynchronous iterators and need nothing. `infer`, ``|`` after any of them and
``pace(rate=…)`` as a step need aiostream: the extra ``[streams]``. This is the one module that imports it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, overload

from aiotime.errors import ConfigurationError, SourceError
from aiotime.frame import Prediction, Sample
from aiotime.ingest.pull import pull

if TYPE_CHECKING:
    from aiostream.core import Stream

    from aiotime.pipeline import Pipeline

T = TypeVar("T")


class Clock(Protocol):
    """What `pace` tells time by."""

    def now(self) -> float:
        """Monotonic seconds."""

    async def sleep(self, seconds: float) -> None:
        """Come back when ``seconds`` have passed."""


class LoopClock:
    """Real time, slept on the event loop."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(asyncio.sleep)


def infer(pipeline: Pipeline, **options: Any) -> Callable[[AsyncIterable[Any]], Stream[Prediction]]:
    """A step of an aiostream pipe that turns frames into the pipeline's predictions.

    When a later step has enough (``pipe.take``), fails or is cancelled, the run and the source are closed.
    Without a pipe ``pipeline.run(source)`` is the same.

    Args:
        pipeline: what computes.
        options: as for ``Pipeline.run`` (``overflow``, ``on_error``, ``deadline``, …).

    Raises:
        ConfigurationError: aiostream is not installed.

    Example::

        frames = stream.iterate(source) | streams.infer(pipeline, overflow="latest") | pipe.take(10)
        async with frames.stream() as predictions:
            async for prediction in predictions:
                ...
    """
    step: Callable[[AsyncIterable[Any]], Stream[Prediction]] = (
        require_aiostream().pipable_operator(_infer).pipe(pipeline, **options)
    )
    return step


async def _infer(source: AsyncIterable[Any], pipeline: Pipeline, **options: Any) -> AsyncIterator[Prediction]:
    async with pipeline.run(source, **options) as run:
        async for prediction in run:
            yield prediction


class Feed(ABC):
    """An asynchronous iterator over frames, to be iterated once: plainly, by a pipeline, or at the head of a pipe.

    Left by ``break`` or cancelled, it closes its sources: at once by `aclose`, as a pipeline does, else when
    it is garbage-collected.
    """

    _items: AsyncGenerator[Any, None] | None = None

    @abstractmethod
    def _generate(self) -> AsyncGenerator[Any, None]:
        """The frames; closes the sources when it is closed."""

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Any:
        if self._items is None:
            self._items = self._generate()
        return anext(self._items)

    async def aclose(self) -> None:
        """End: every source is closed and every task has ended. Idempotent."""
        if self._items is None:
            self._items = self._generate()
        await self._items.aclose()

    def __or__(self, step: Callable[[Stream[Any]], T]) -> T:
        """``feed | step``: this feed at the head of an aiostream pipe."""
        return step(require_aiostream().stream.iterate(self))


class _End:
    """A source of a merge has ended, with the error it ended by."""

    __slots__ = ("error",)

    def __init__(self, error: Exception | None) -> None:
        self.error = error


class Merged(Feed):
    """Several sources as one stream of samples; see `merge`."""

    def __init__(self, sources: dict[str, Any]) -> None:
        self._sources = sources

    async def _generate(self) -> AsyncGenerator[Sample, None]:
        turns: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()  # at most one entry a source, so first come is fair
        taken = {name: asyncio.Event() for name in self._sources}
        feeders = [
            asyncio.create_task(_feed(name, source, turns, taken[name]), name=f"merge:{name}")
            for name, source in self._sources.items()
        ]
        try:
            for _ in feeders:
                while not isinstance((turn := await turns.get())[1], _End):
                    name, item = turn
                    taken[name].set()  # it fetches its next one while this one is worked on
                    yield keyed(item, name)
                name, end = turn
                if end.error is not None:
                    raise SourceError(
                        f"source {name!r} of a merge failed: {type(end.error).__name__}: {end.error}"
                    ) from end.error
        finally:
            for feeder in feeders:
                feeder.cancel()
            await asyncio.gather(*feeders, return_exceptions=True)


async def _feed(name: str, source: Any, turns: asyncio.Queue[tuple[str, Any]], taken: asyncio.Event) -> None:
    """Offer the items of one source, each when the one before was taken; then its end."""
    error: Exception | None = None
    try:
        frames = pull(source, room=lambda: 1)
        try:
            async for item in frames:
                taken.clear()
                turns.put_nowait((name, item))
                del item
                await taken.wait()
        finally:
            await close(frames)
    except Exception as failure:  # noqa: BLE001 - raised where the merge is iterated, with the source's name
        error = failure
    turns.put_nowait((name, _End(error)))


def merge(**sources: Any) -> Merged:
    """Several sources as one stream of `Sample`, each keyed by its source's name.

    A sample's own key is kept beside it: ``(name, key)``. Sources are served in turn as they have something: each
    is fetched one frame ahead, so none starves another and a slow consumer slows all. A blocking iterable is
    pulled on a thread of its own. The stream ends when every source has ended.

    Args:
        sources: whatever ``Pipeline.run`` takes as a source, by name.

    Raises:
        ConfigurationError: no source was given.
        SourceError: while iterating: a source raised; the message names it. The others are closed.

    Example::

        async for prediction in pipeline.run(streams.merge(door=Webcam("/dev/video0"), yard=Webcam("/dev/video1"))):
            print(prediction.key)  # ("door", 0.033), ("yard", 0.031), …
    """
    if not sources:
        raise ConfigurationError("merge needs at least one source, by name: merge(left=camera, right=camera)")
    return Merged(sources)


class Paced(Feed):
    """A source at a stated rate; see `pace`.

    Attributes:
        count: items given out.
        lag: seconds that the newest item came behind the schedule that the first one began.
    """

    def __init__(self, source: Any, rate: float, clock: Clock) -> None:
        self.count = 0
        self.lag = 0.0
        self._source = source
        self._period = 1.0 / rate
        self._clock = clock

    @property
    def lagging(self) -> bool:
        """True once the stream is more than one period behind: source or consumer is slower than the rate."""
        return self.lag > self._period

    async def _generate(self) -> AsyncGenerator[Any, None]:
        frames, clock, period = pull(self._source, room=lambda: 1), self._clock, self._period
        given_up = 0.0  # seconds by which the schedule was moved
        due: float | None = None
        try:
            async for item in frames:
                due = clock.now() if due is None else due + period
                while (early := due - clock.now()) > 0:
                    await clock.sleep(early)
                self.count += 1
                self.lag = given_up - early
                if -early > period:  # too late to catch up without a burst: the schedule moves
                    given_up -= early
                    due -= early
                yield item
        finally:
            await close(frames)


@overload
def pace(source: Any, /, *, rate: float, clock: Clock | None = None) -> Paced: ...


@overload
def pace(*, rate: float, clock: Clock | None = None) -> Callable[[AsyncIterable[Any]], Stream[Any]]: ...


def pace(source: Any = None, /, *, rate: float, clock: Clock | None = None) -> Any:
    """The items of ``source`` at no more than ``rate`` a second, on an absolute schedule: timer errors do not add up.

    Item k is due k / rate seconds after the first. One that comes late goes out at once; where it is more than a
    period late the schedule moves, so that a pause is never followed by a burst. What was given
    up so is told by ``lag`` and ``lagging`` of the returned object. In any t seconds at most ``rate * t + 2`` go out.

    Args:
        source: whatever ``Pipeline.run`` takes as a source. Left out, the result is a step of an aiostream pipe.
        rate: items per second.
        clock: what to tell time by; real time otherwise.

    Raises:
        ConfigurationError: the rate is not positive; or, for a step of a pipe, aiostream is not installed.
    """
    if not 0 < rate < float("inf"):
        raise ConfigurationError(f"rate must be a positive number of items per second, not {rate!r}")
    clock = LoopClock() if clock is None else clock
    if source is not None:
        return Paced(source, rate, clock)
    return require_aiostream().pipable_operator(_pace).pipe(rate, clock)


async def _pace(source: AsyncIterable[Any], rate: float, clock: Clock) -> AsyncIterator[Any]:
    paced = Paced(source, rate, clock)
    try:
        async for item in paced:
            yield item
    finally:
        await paced.aclose()


def keyed(item: Any, name: str) -> Sample:
    """``item`` as a sample that says it is from source ``name``."""
    if not isinstance(item, Sample):
        return Sample(item, key=name)
    return dataclasses.replace(item, key=name if item.key is None else (name, item.key))


async def close(frames: AsyncIterator[Any]) -> None:
    """Close what `pull` made, where it can be closed."""
    aclose = getattr(frames, "aclose", None)
    if aclose is not None:
        await aclose()


def require_aiostream() -> Any:
    """The package aiostream, or a `ConfigurationError` that says how to get it."""
    try:
        import aiostream
    except ImportError as error:
        raise ConfigurationError(
            'this needs aiostream (licence: GPL-3.0-or-later): pip install "aiotime[streams]"; without it use '
            "pipeline.run(source), streams.merge(…) and streams.pace(source, rate=…) as plain iterators"
        ) from error
    return aiostream
