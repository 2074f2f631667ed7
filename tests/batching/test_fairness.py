"""Runs that share a pipeline get their share of it, whatever one of them throws at it; with batches and without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from aiotime import Pipeline, SimulatedDevice, Stage, VirtualClock

ONE = torch.ones(1)
batches = pytest.mark.parametrize("max_batch", [1, 4])


def shared(max_batch: int) -> tuple[Pipeline, VirtualClock]:
    """One stage that takes a second per job; 8 frames in flight."""
    clock = VirtualClock()
    stage = Stage(lambda x: x, device=SimulatedDevice(0, seconds=1.0, clock=clock), max_batch=max_batch, name="one")
    return Pipeline.from_stages([stage], depth=8), clock


async def endless() -> AsyncIterator[torch.Tensor]:
    while True:
        yield ONE


async def many(number: int) -> AsyncIterator[torch.Tensor]:
    for _ in range(number):
        yield ONE


@pytest.mark.asyncio
@batches
async def test_greedy_runs_have_equal_shares(max_batch: int) -> None:
    """Three runs that take what they can get: after any time none is more than a round ahead of another."""
    pipeline, clock = shared(max_batch)
    counts = [0, 0, 0]

    async def greedy(at: int) -> None:
        async with pipeline.run(endless()) as run:
            async for _ in run:
                counts[at] += 1
                if clock.now() >= 60:
                    return

    async with pipeline:
        await asyncio.gather(*map(greedy, range(3)))
    assert sum(counts) >= 55 * max_batch
    assert max(counts) - min(counts) <= 8 + max_batch


@pytest.mark.asyncio
@batches
async def test_a_burst_does_not_push_others_out(max_batch: int) -> None:
    """Two steady runs beside one with 400 frames at once keep their pace; a frame waits for one round of credits."""
    pipeline, clock = shared(max_batch)
    latencies: list[float] = []

    async def steady(offset: float) -> None:
        async def every_few_seconds() -> AsyncIterator[torch.Tensor]:
            await clock.sleep(offset)
            for _ in range(10):
                yield ONE
                await clock.sleep(8.0)

        latencies.extend([prediction.latency async for prediction in pipeline.run(every_few_seconds())])

    async def burst() -> None:
        async with pipeline.run(many(400)) as run:
            async for _ in run:
                if clock.now() > 90:
                    return

    async with pipeline:
        await asyncio.gather(steady(1.5), steady(3.5), burst())
    assert len(latencies) == 20
    rounds = 8 / max_batch  # seconds that what is in flight takes
    assert max(latencies) <= rounds + 3.0
