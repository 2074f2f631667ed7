"""Tests of aiotime.streams: merging, pacing and the step of an aiostream pipe."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotime import streams
from aiotime.errors import ConfigurationError, SourceError
from aiotime.frame import Sample

if TYPE_CHECKING:
    from tests.conftest import Settle


class Tape:
    """An async source that records what was taken from it and that it was closed."""

    def __init__(self, items: int | None = None, *, error: Exception | None = None) -> None:
        self.items, self.error = items, error
        self.taken = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[int]:
        try:
            while self.items is None or self.taken < self.items:
                self.taken += 1
                yield self.taken - 1
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


class HandClock:
    """Virtual seconds: a sleep moves them, and so does the test."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)


# ---------------------------------------------------------------------------------------------------- merge


@pytest.mark.asyncio
async def test_merge_gives_everything_once_with_the_key_of_its_source() -> None:
    """Every item of every source comes out once, in its source's order, as a Sample keyed by the source."""
    merged = [sample async for sample in streams.merge(a=Tape(3), b=Tape(5), c=[7, 8])]
    assert all(isinstance(sample, Sample) for sample in merged)
    by_source = {key: [s.input for s in merged if s.key == key] for key in "abc"}
    assert by_source == {"a": [0, 1, 2], "b": [0, 1, 2, 3, 4], "c": [7, 8]}


@pytest.mark.asyncio
async def test_merge_keeps_the_key_of_a_sample_beside_the_source() -> None:
    """A sample that has a key comes out keyed (source, key), with its target and deadline."""
    sample = Sample(1, target=2, key="x", deadline=3.0)
    (merged,) = [s async for s in streams.merge(a=[sample])]
    assert (merged.key, merged.input, merged.target, merged.deadline) == (("a", "x"), 1, 2, 3.0)


@pytest.mark.asyncio
async def test_merge_is_fair() -> None:
    """An endless source that is always ready does not starve another that is always ready."""
    merged = streams.merge(greedy=Tape(), modest=Tape())
    keys = [(await anext(merged)).key for _ in range(40)]
    await merged.aclose()
    assert 18 <= keys.count("modest") <= 22


@pytest.mark.asyncio
async def test_merge_fetches_one_ahead_and_no_more(settle: Settle) -> None:
    """A consumer that takes nothing stops every source after one more item."""
    tape = Tape()
    merged = streams.merge(only=tape)
    await anext(merged)
    await settle()
    assert tape.taken == 2
    await merged.aclose()


@pytest.mark.asyncio
async def test_merge_fetches_one_ahead_of_each_source(settle: Settle) -> None:
    """Taking from one source does not make another fetch more than its one."""
    tapes = {"a": Tape(), "b": Tape()}
    merged = streams.merge(**tapes)
    keys = []
    for _ in range(5):
        keys.append((await anext(merged)).key)
        await settle()
        assert all(tape.taken <= keys.count(name) + 1 for name, tape in tapes.items())
    await merged.aclose()


@pytest.mark.asyncio
async def test_merge_names_the_source_that_failed_and_closes_the_others() -> None:
    """The error says which source, carries its cause, and no other source stays open."""
    healthy, broken = Tape(), Tape(2, error=OSError("unplugged"))
    merged = streams.merge(healthy=healthy, broken=broken)
    with pytest.raises(SourceError, match=r"'broken'.*unplugged") as caught:
        async for _ in merged:
            pass
    assert isinstance(caught.value.__cause__, OSError)
    assert healthy.closed


@pytest.mark.asyncio
async def test_merge_left_early_closes_every_source(settle: Settle) -> None:
    """Aclose after one item: every source is closed and no task is left."""
    tapes = {"a": Tape(), "b": Tape()}
    merged = streams.merge(**tapes)
    await anext(merged)
    await merged.aclose()
    await merged.aclose()
    assert all(tape.closed for tape in tapes.values())


@pytest.mark.asyncio
async def test_merge_cancelled_while_waiting_closes_every_source(settle: Settle) -> None:
    """Cancelling the consumer while all sources are silent ends them."""
    closed = []

    async def silent(name: str) -> AsyncIterator[int]:
        try:
            await asyncio.get_running_loop().create_future()
            yield 0
        finally:
            closed.append(name)

    task = asyncio.create_task(anext(streams.merge(a=silent("a"), b=silent("b"))))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(closed) == ["a", "b"]


@pytest.mark.asyncio
async def test_merge_goes_on_while_one_source_blocks() -> None:
    """A blocking iterable waits on a thread of its own: the other source is served, and it is closed in the end."""
    gate, closed = threading.Event(), threading.Event()

    def blocking() -> Iterator[int]:
        try:
            gate.wait()
            yield 0
        finally:
            closed.set()

    merged = streams.merge(stuck=blocking(), free=Tape(20))
    keys = [(await anext(merged)).key for _ in range(20)]
    gate.set()
    keys += [sample.key async for sample in merged]
    assert keys == ["free"] * 20 + ["stuck"]
    assert closed.is_set()


@pytest.mark.asyncio
async def test_merge_that_ends_lets_a_longer_source_finish() -> None:
    """A short source that ends does not end the stream for a longer one."""
    merged = [s.key async for s in streams.merge(short=Tape(0), long=Tape(4))]
    assert merged == ["long"] * 4


def test_merge_of_nothing_is_refused() -> None:
    """Merging no source says how to name one."""
    with pytest.raises(ConfigurationError, match="left="):
        streams.merge()


# ---------------------------------------------------------------------------------------------------- pace


@pytest.mark.asyncio
async def test_pace_keeps_an_absolute_schedule() -> None:
    """Item k comes k periods after the first even though the consumer takes time and sleeps end late."""
    clock = HandClock()
    times = []
    paced = streams.pace(Tape(50), rate=10.0, clock=clock)
    async for _ in paced:
        times.append(clock.now())
        clock.seconds += 0.07
    assert times == pytest.approx([100.0 + 0.1 * k for k in range(50)])
    assert paced.count == 50
    assert paced.lag == pytest.approx(0.0, abs=1e-9)
    assert not paced.lagging


@pytest.mark.asyncio
async def test_pace_after_a_pause_gives_no_burst_and_says_that_it_lags() -> None:
    """A consumer that stops for 10 periods meets one item at once and then the stated rate again."""
    clock = HandClock()
    times = []
    paced = streams.pace(Tape(6), rate=10.0, clock=clock)
    async for item in paced:
        times.append(round(clock.now() - 100.0, 6))
        if item == 1:
            clock.seconds += 1.0
    assert times == [0.0, 0.1, 1.1, 1.2, 1.3, 1.4]
    assert paced.lagging
    assert paced.lag == pytest.approx(0.9)


@pytest.mark.asyncio
async def test_pace_catches_up_what_is_less_than_a_period() -> None:
    """An item half a period late does not move the schedule: the next one is on time."""
    clock = HandClock()
    times = []
    paced = streams.pace(Tape(4), rate=10.0, clock=clock)
    async for item in paced:
        times.append(round(clock.now() - 100.0, 6))
        clock.seconds += 0.15 if item == 1 else 0.0
    assert times == [0.0, 0.1, 0.25, 0.3]
    assert not paced.lagging


@given(st.lists(st.floats(0, 3, allow_nan=False), max_size=60), st.floats(0.2, 50))
def test_pace_never_exceeds_its_rate(pauses: list[float], rate: float) -> None:
    """Whatever the consumer's pauses, any t seconds see at most rate * t + 2 items."""

    async def scenario() -> list[float]:
        clock, times = HandClock(), []
        async for item in streams.pace(Tape(len(pauses)), rate=rate, clock=clock):
            times.append(clock.now())
            clock.seconds += pauses[item]
        return times

    times = asyncio.run(scenario())
    assert len(times) == len(pauses)
    for i, start in enumerate(times):
        for j in range(i, len(times)):
            assert j - i + 1 <= rate * (times[j] - start) + 2 + 1e-6


@pytest.mark.asyncio
async def test_pace_on_the_real_clock_gives_every_item() -> None:
    """Without a clock it paces by real time, and loses nothing."""
    assert [item async for item in streams.pace(range(20), rate=10_000.0)] == list(range(20))


@pytest.mark.asyncio
async def test_pace_closes_its_source() -> None:
    """Leaving a paced source closes the source behind it."""
    tape = Tape()
    paced = streams.pace(tape, rate=1000.0, clock=HandClock())
    await anext(paced)
    await paced.aclose()
    assert tape.closed


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_pace_refuses_a_rate_that_is_none(rate: float) -> None:
    """A rate must be positive and finite."""
    with pytest.raises(ConfigurationError, match="positive"):
        streams.pace([], rate=rate)


# ---------------------------------------------------------------------------------------------------- pipes


def full(value: int, *_: int) -> torch.Tensor:
    """A frame of one value."""
    return torch.full((1, 2), float(value))


@pytest.mark.asyncio
async def test_pace_and_merge_work_in_a_pipe() -> None:
    """A merge at the head of a pipe, paced by a step, cut by take: keys kept, sources closed."""
    from aiostream import pipe

    tapes = {"a": Tape(), "b": Tape()}
    piped = streams.merge(**tapes) | streams.pace(rate=5.0, clock=HandClock()) | pipe.take(6)
    async with piped.stream() as streamer:
        keys = [sample.key async for sample in streamer]
    assert sorted(keys) == ["a"] * 3 + ["b"] * 3
    assert all(tape.closed for tape in tapes.values())


@pytest.mark.asyncio
async def test_a_paced_step_starts_anew_with_each_iteration() -> None:
    """Aiostream's streams can be iterated again; a paced step then paces again."""
    from aiostream import stream

    piped = stream.iterate(Tape(3)) | streams.pace(rate=5.0, clock=HandClock())
    for expected in ([0, 1, 2], []):  # the tape ends for good
        async with piped.stream() as streamer:
            assert [item async for item in streamer] == expected


@pytest.mark.asyncio
async def test_infer_in_a_pipe_closes_run_and_source_after_take(tiny_pipeline: Any) -> None:
    """`take` ends an endless source: predictions in order, the run closed, the source closed."""
    from aiostream import pipe, stream

    tape = Tape()
    frames = stream.iterate(tape) | pipe.map(full)
    piped = frames | streams.infer(tiny_pipeline) | pipe.take(5)
    async with piped.stream() as streamer:
        outputs = [float(prediction.output[0, 0]) async for prediction in streamer]
    assert outputs == [2 * k + 1.0 for k in range(5)]
    assert tape.closed


@pytest.mark.asyncio
async def test_infer_passes_its_options_to_the_run(tiny_pipeline: Any) -> None:
    """on_error="skip" given to the step skips a frame that the door refuses."""
    from aiostream import stream

    frames = [torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2)]
    piped = stream.iterate(frames) | streams.infer(tiny_pipeline, on_error="skip")
    async with piped.stream() as streamer:
        assert [prediction.index async for prediction in streamer] == [0, 2]


@pytest.mark.asyncio
async def test_infer_raises_the_error_of_its_source(tiny_pipeline: Any) -> None:
    """A source that fails fails the pipe, with the frames before it delivered."""
    from aiostream import pipe, stream

    source = stream.iterate(Tape(2, error=OSError("gone"))) | pipe.map(full)
    seen = 0
    with pytest.raises(SourceError, match="gone"):
        async with (source | streams.infer(tiny_pipeline)).stream() as streamer:
            async for _ in streamer:
                seen += 1
    assert seen == 2


@pytest.mark.asyncio
async def test_merged_cameras_keep_their_keys_through_a_pipeline(tiny_pipeline: Any) -> None:
    """Two sources through one pipeline: each prediction belongs to the source its frame came from."""
    left = [torch.full((1, 2), float(k)) for k in range(6)]
    right = [torch.full((1, 2), 100.0 + k) for k in range(6)]
    found: dict[Any, list[float]] = {"left": [], "right": []}
    async with tiny_pipeline.run(streams.merge(left=left, right=right)) as run:
        async for prediction in run:
            found[prediction.key].append(float(prediction.output[0, 0]))
    assert found == {"left": [2 * k + 1.0 for k in range(6)], "right": [2 * (100.0 + k) + 1.0 for k in range(6)]}


def test_without_aiostream_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where aiostream is missing, steps of a pipe say what to install, and plain pacing still works."""
    monkeypatch.setitem(sys.modules, "aiostream", None)
    with pytest.raises(ConfigurationError, match=r"aiotime\[streams\]"):
        streams.infer(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"aiotime\[streams\]"):
        streams.pace(rate=3.0)
    assert isinstance(streams.pace([], rate=3.0), streams.Paced)


@pytest.fixture
def tiny_pipeline() -> Any:
    """2x + 1 in two inline stages."""
    from aiotime import Pipeline

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    class Increment(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = torch.nn.Sequential(Double(), Increment())
    return Pipeline(model, example=torch.zeros(1, 2), devices=["cpu:0", "cpu:1"], balance="even")
