"""What a service asks a pipeline about itself: ready or not, and its last numbers after the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from aiotime import Pipeline, Stage
from aiotime.errors import ClosedError


def double(x: int) -> int:
    """A stage."""
    return 2 * x


@pytest.mark.asyncio
async def test_ready_says_whether_a_request_would_be_taken() -> None:
    """Closed, paused and draining pipelines are not ready; open ones are."""
    pipeline = Pipeline.from_stages([double])

    def ready() -> bool:
        return pipeline.ready

    assert not ready()
    async with pipeline:
        assert ready()
        pipeline.pause()
        assert not ready()
        pipeline.resume()
        assert ready()
        await pipeline.drain()
        assert not ready()
        with pytest.raises(ClosedError, match="draining"):
            await pipeline.submit(1)
        pipeline.resume()
        assert (await pipeline.submit(1)).output == 2
    assert not ready()


@pytest.mark.asyncio
async def test_the_last_statistics_outlive_the_pipeline() -> None:
    """A run that opens and closes the pipeline by itself leaves its numbers behind."""
    pipeline = Pipeline.from_stages([double])
    with pytest.raises(ClosedError, match="never open"):
        pipeline.stats()
    assert [pred.output async for pred in pipeline.run(range(5))] == [0, 2, 4, 6, 8]
    stats = pipeline.stats()
    assert (stats.frames_in, stats.frames_out, stats.in_flight) == (5, 5, 0)


class Weight(torch.nn.Module):
    """Adds its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scalar in, scalar out."""
        return x + self.w


@pytest.mark.asyncio
async def test_closing_in_the_middle_of_a_swap_leaves_no_half_new_weights() -> None:
    """The caller is told that the pipeline closed, and every stage has the new weights."""
    inside, gate = threading.Event(), threading.Event()

    def gated(x: torch.Tensor) -> torch.Tensor:
        inside.set()
        gate.wait()
        return x

    pipeline = Pipeline.from_stages([Stage(Weight(), name="a"), gated, Stage(Weight(), name="b")], depth=2)
    async with pipeline:
        request = asyncio.ensure_future(pipeline.submit(torch.zeros(())))
        await asyncio.to_thread(inside.wait)
        swap = asyncio.ensure_future(pipeline.load_state_dict({"a.w": torch.ones(()), "b.w": torch.ones(())}))
        for _ in range(100):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(pipeline.aclose())
        for _ in range(100):
            await asyncio.sleep(0)
        gate.set()
        await closing
        results = await asyncio.gather(request, swap, return_exceptions=True)
    assert all(isinstance(result, ClosedError) for result in results)
    assert {key: float(value) for key, value in pipeline.state_dict().items()} == {"a.w": 1.0, "b.w": 1.0}


@pytest.mark.asyncio
async def test_a_source_that_swallows_cancellation_cannot_hold_up_the_end() -> None:
    """It is left after the next frame it yields."""

    async def stubborn() -> AsyncIterator[int]:
        number = 0
        while True:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass
            yield number
            number += 1

    pipeline = Pipeline.from_stages([double])
    async with asyncio.timeout(10), pipeline.run(stubborn()) as run:
        async for pred in run:
            if pred.index == 3:
                break


@pytest.mark.asyncio
async def test_a_pause_holds_before_opening_and_through_warm_up() -> None:
    """Paused while closed, it opens with a closed door, warm-up or not; ``resume`` lets frames in."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    pipeline = await asyncio.to_thread(
        lambda: Pipeline(model, example=torch.zeros(1, 2), devices=["cpu:0"], balance="even", warm_up=2)
    )
    pipeline.pause()
    async with pipeline:
        request = asyncio.ensure_future(pipeline.submit(torch.zeros(1, 2)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not request.done() and pipeline.stats().waiting == 1
        pipeline.resume()
        await request
