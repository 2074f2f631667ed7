"""What a service asks a pipeline about itself: ready or not, and its last numbers after the end."""

from __future__ import annotations

import pytest

import aiotime
from aiotime.errors import ClosedError


def double(x: int) -> int:
    """A stage."""
    return 2 * x


@pytest.mark.asyncio
async def test_ready_says_whether_a_request_would_be_taken() -> None:
    """Closed, paused and draining pipelines are not ready; open ones are."""
    pipeline = aiotime.Pipeline.from_stages([double])

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
    pipeline = aiotime.Pipeline.from_stages([double])
    with pytest.raises(ClosedError, match="never open"):
        pipeline.stats()
    assert [pred.output async for pred in pipeline.run(range(5))] == [0, 2, 4, 6, 8]
    stats = pipeline.stats()
    assert (stats.frames_in, stats.frames_out, stats.in_flight) == (5, 5, 0)
