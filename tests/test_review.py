"""What a review of the core broke once: odd exceptions, odd payloads, odd moments."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.errors import BrokenError, FrameCancelled, SourceError, StageError
from aiotime.ingest.inspection import InputSpec, payload_bytes


class Speechless(Exception):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no message")


class Odd(BaseException):
    """Neither an Exception nor one that belongs to the loop."""


@pytest.mark.asyncio
async def test_an_exception_without_a_message_fails_its_frame() -> None:
    """A worker survives an exception whose ``__str__`` raises."""

    def stage(value: Any) -> Any:
        raise Speechless

    async with Pipeline.from_stages([stage]) as pipeline, asyncio.timeout(10):
        with pytest.raises(StageError, match="Speechless"):
            await pipeline.submit(1)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [Odd("odd"), asyncio.CancelledError()])
async def test_a_simulated_stage_may_raise_any_exception(error: BaseException) -> None:
    """A BaseException of user code fails its frame on a simulated device, as on every other."""

    def stage(value: Any) -> Any:
        raise error

    device = SimulatedDevice(0, seconds=1.0, clock=VirtualClock())
    async with Pipeline.from_stages([Stage(stage, device=device)]) as pipeline, asyncio.timeout(10):
        with pytest.raises(StageError):
            await pipeline.submit(1)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [Odd("odd"), GeneratorExit()])
async def test_a_source_may_raise_any_exception(error: BaseException) -> None:
    """A BaseException of the source is no quiet end of the stream."""

    async def source() -> AsyncIterator[int]:
        yield 1
        raise error

    run = Pipeline.from_stages([lambda x: x]).run(source())
    assert (await anext(run)).output == 1
    with pytest.raises(SourceError):
        await anext(run)


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["cpu:0", "inline"])
async def test_an_idle_pipeline_keeps_no_output(device: str) -> None:
    """The last output dies with its user, not with the next frame."""
    async with Pipeline.from_stages([Stage(lambda x: x + 1, device=device)]) as pipeline:
        submitted = (await pipeline.submit(torch.zeros(2))).output
        first = weakref.ref(submitted)
        del submitted
        streamed = [prediction.output async for prediction in pipeline.run([torch.zeros(2)])]
        second = weakref.ref(streamed[0])
        del streamed
        await asyncio.sleep(0)
        gc.collect()
        assert first() is None
        assert second() is None


@pytest.mark.asyncio
async def test_an_answer_that_nobody_took_is_not_acknowledged() -> None:
    """Cancelled between the answer and its delivery, the acknowledgement says so."""
    async with Pipeline.from_stages([Stage(lambda x: x, device="inline")]) as pipeline:
        for turns in range(1, 8):
            told: list[BaseException | None] = []
            task = asyncio.create_task(pipeline.submit(Sample(1, ack=told.append)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0)
            assert len(told) == 1
            assert isinstance(told[0], FrameCancelled) if task.cancelled() else told[0] is None


@pytest.mark.asyncio
async def test_a_run_on_a_broken_pipeline_is_told_at_once() -> None:
    """It does not wait for a source that may never yield."""

    async def source() -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 1

    async with Pipeline.from_stages([lambda x: x]) as pipeline, asyncio.timeout(10):
        engine = pipeline._engine
        assert engine is not None
        engine.end(BrokenError("broken for the test"))
        with pytest.raises(BrokenError):
            await anext(pipeline.run(source()))


@pytest.mark.asyncio
async def test_a_second_aclose_waits_for_the_first() -> None:
    """Whoever closes may rely on nothing being left when it returns."""
    gate = threading.Event()
    pipeline = await Pipeline.from_stages([Stage(lambda x: gate.wait(10), device="cpu:0")]).__aenter__()
    request = asyncio.create_task(pipeline.submit(1))
    first, second = asyncio.create_task(pipeline.aclose()), asyncio.create_task(pipeline.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    assert first.done() == second.done()
    gate.set()
    await asyncio.gather(first, second)
    await asyncio.gather(request, return_exceptions=True)


def test_a_pipeline_left_open_on_a_dead_loop_can_be_closed() -> None:
    """Its threads ended with the loop; closing it later does no harm."""
    pipeline = Pipeline.from_stages([lambda x: x])

    async def leave_open() -> None:
        await pipeline.__aenter__()

    asyncio.run(leave_open())
    asyncio.run(pipeline.aclose())


def test_the_order_of_a_frames_keys_does_not_matter() -> None:
    """A dict of keyword arguments is the same dict in any order."""
    spec = InputSpec({"a": torch.zeros(1), "b": (torch.zeros(2), {"c": torch.zeros(3), "d": torch.zeros(4)})})
    checked = spec.check({"b": (torch.zeros(2), {"d": torch.zeros(4), "c": torch.zeros(3)}), "a": torch.zeros(1)})
    assert list(checked) == ["a", "b"]
    assert list(checked["b"][1]) == ["c", "d"]


def test_byte_strings_and_sparse_tensors_have_a_size() -> None:
    """The byte budget sees encoded frames too."""
    assert payload_bytes({"image": b"12345", "more": bytearray(2)}) == 7
    assert payload_bytes(torch.zeros(2, 2).to_sparse()) == 16


@pytest.mark.asyncio
async def test_an_idle_worker_takes_a_ready_job_from_behind_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers a frame that is ready is not held up by the one before it, still in the stage before."""
    monkeypatch.setattr("aiotime.devices.worker.ORPHAN_CHECK", 60.0)  # nobody wakes by chance
    gate, second_done = threading.Event(), threading.Event()

    def first(number: int) -> int:
        if number == 0:
            gate.wait()
        return number

    def second(number: int) -> int:
        if number == 1:
            second_done.set()
        return number

    pipeline = Pipeline.from_stages([Stage(first, workers=2), Stage(second, workers=2)], depth=2)
    try:
        async with pipeline, pipeline.run(range(2)) as run:
            head = asyncio.ensure_future(run.__anext__())
            assert await asyncio.to_thread(second_done.wait, 10)
            gate.set()
            assert (await head).output == 0
            assert (await run.__anext__()).output == 1
    finally:
        gate.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
async def test_a_sample_with_an_impossible_deadline_is_refused_in_its_turn(deadline: float) -> None:
    """It fails as a refused frame; the frames around it come out."""
    letters: list[str] = []
    pipeline = Pipeline.from_stages([lambda value: value])
    source = [Sample(1), Sample(2, deadline=deadline), Sample(3, deadline=60.0)]
    run = pipeline.run(source, on_error=lambda frame, error: letters.append(str(error)))
    assert [pred.output async for pred in run] == [1, 3]
    assert len(letters) == 1 and "deadline is a positive number" in letters[0]
