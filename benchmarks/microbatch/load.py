"""Streams that press on a pipeline: as fast as it goes, at a given pace, several at once; and what came of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

import aiotime
from benchmarks._harness import percentile


@dataclass
class Outcome:
    """Of one stream."""

    frames_per_second: float
    latencies: list[float]  # seconds from when a frame was due to its prediction in the consumer's hands
    batch: float = 1.0  # frames per job, mean over the stages

    def quantile(self, share: float) -> float:
        """Of the latencies, in milliseconds."""
        return 1e3 * percentile(self.latencies, share)


def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """The same work: every output is the model's own on that frame, up to rounding."""
    for at, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[at % len(expected)], rtol=1e-3, atol=1e-4)


def cycle(frames: Sequence[torch.Tensor], number: int) -> Iterator[torch.Tensor]:
    """``number`` frames, again and again the same."""
    for at in range(number):
        yield frames[at % len(frames)]


def mean_batch(before: aiotime.Stats, after: aiotime.Stats) -> float:
    """Frames per job between two snapshots."""
    stages = after.since(before).stages
    return sum(stage.batch_mean for stage in stages) / len(stages)


async def saturated(
    pipeline: aiotime.Pipeline, frames: Sequence[torch.Tensor], number: int, expected: Sequence[torch.Tensor]
) -> Outcome:
    """As fast as it goes, after a warm-up; the latency is that of a frame in a pipeline which is full."""
    async with pipeline:
        async for _ in pipeline.run(cycle(frames, number // 4)):
            pass
        before = pipeline.stats()
        outputs, latencies = [], []
        start = perf_counter()
        async for prediction in pipeline.run(cycle(frames, number)):
            outputs.append(prediction.output)
            latencies.append(prediction.latency)
        spent = perf_counter() - start
        batch = mean_batch(before, pipeline.stats())
    check(outputs, expected)
    return Outcome(number / spent, latencies, batch)


class Pace:
    """Frames that are due at the times of a Poisson process; remembers when each was due.

    The loop's timers have a resolution of a millisecond, so those of one millisecond come together. A frame that the
    pipeline does not take in time is late, and its latency counts from when it was due.

    Args:
        rate: frames per second.
        burst: so many are due at one instant; the instants are as many times rarer.
    """

    def __init__(self, frames: Sequence[torch.Tensor], number: int, rate: float, *, seed: int, burst: int = 1) -> None:
        self.frames = frames
        self.number = number
        self.due: list[float] = []
        chance = random.Random(seed)
        at = 0.0
        self.offsets: list[float] = []
        while len(self.offsets) < number:
            at += chance.expovariate(rate / burst)
            self.offsets += [at] * burst

    async def __aiter__(self) -> AsyncIterator[torch.Tensor]:
        start = perf_counter()
        for at in range(self.number):
            due = start + self.offsets[at]
            wait = due - perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            self.due.append(due)
            yield self.frames[at % len(self.frames)]


async def follow(pipeline: aiotime.Pipeline, pace: Pace, expected: Sequence[torch.Tensor]) -> Outcome:
    """One paced stream through an open pipeline."""
    outputs, latencies = [], []
    start = perf_counter()
    async for prediction in pipeline.run(pace):
        latencies.append(perf_counter() - pace.due[prediction.index])
        outputs.append(prediction.output)
    spent = perf_counter() - start
    check(outputs, expected)
    return Outcome(len(outputs) / spent, latencies)


async def paced(
    pipeline: aiotime.Pipeline,
    frames: Sequence[torch.Tensor],
    number: int,
    expected: Sequence[torch.Tensor],
    *,
    rate: float,
    seed: int,
    burst: int = 1,
) -> Outcome:
    """One stream at ``rate`` frames per second."""
    async with pipeline:
        async for _ in pipeline.run(cycle(frames, 200)):
            pass
        before = pipeline.stats()
        outcome = await follow(pipeline, Pace(frames, number, rate, seed=seed, burst=burst), expected)
        outcome.batch = mean_batch(before, pipeline.stats())
    return outcome


async def greedy(pipeline: aiotime.Pipeline, frames: Sequence[torch.Tensor], stop: asyncio.Event) -> int:
    """A run that takes what it can get, until told to stop; how many frames it had."""
    count = 0
    async with pipeline.run(cycle(frames, 10**9)) as run:
        async for _ in run:
            count += 1
            if stop.is_set():
                break
    return count


async def shares(pipeline: aiotime.Pipeline, frames: Sequence[torch.Tensor], seconds: float) -> list[float]:
    """Of three runs that all take what they can get: each one's share of the frames."""
    stop = asyncio.Event()
    async with pipeline:
        async for _ in pipeline.run(cycle(frames, 200)):
            pass
        runs = [asyncio.ensure_future(greedy(pipeline, frames, stop)) for _ in range(3)]
        await asyncio.sleep(seconds)
        stop.set()
        counts = await asyncio.gather(*runs)
    return [count / sum(counts) for count in counts]


async def beside(
    pipeline: aiotime.Pipeline,
    frames: Sequence[torch.Tensor],
    number: int,
    expected: Sequence[torch.Tensor],
    *,
    rate: float,
    crowd: bool,
) -> tuple[list[Outcome], float]:
    """Two steady runs at ``rate`` each, alone or beside a greedy one; and what that had, in frames per second."""
    stop = asyncio.Event()
    async with pipeline:
        async for _ in pipeline.run(cycle(frames, 200)):
            pass
        start = perf_counter()
        third = asyncio.ensure_future(greedy(pipeline, frames, stop)) if crowd else None
        paces = [Pace(frames, number, rate, seed=seed) for seed in (1, 2)]
        steady = await asyncio.gather(*(follow(pipeline, pace, expected) for pace in paces))
        stop.set()
        count = await third if third is not None else 0
    return list(steady), count / (perf_counter() - start)
