"""A random hour in a second: runs, requests, cancellations, swaps, budgets, pauses; afterwards everything is zero."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from aiotime import Pipeline, Sample, Stage
from aiotime.errors import DeadlineExceeded, StageError

SECONDS = 0.7


class Weight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.w])


def check(x: torch.Tensor) -> torch.Tensor:
    if x[0] < 0:
        raise ValueError("negative")
    return x


class Soak:
    """Everything that can happen to a pipeline, at random."""

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        self.pipeline = pipeline
        self.random = random.Random(seed)
        self.acks: list[list[BaseException | None]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.version = 0.0

    def sample(self, value: float, **options: Any) -> Sample:
        self.acks.append([])
        return Sample(torch.tensor([value]), ack=self.acks[-1].append, **options)

    async def source(self) -> AsyncIterator[Sample]:
        for i in range(self.random.randrange(1, 200)):
            yield self.sample(-1.0 if self.random.random() < 0.02 else float(i), key=i)
            if self.random.random() < 0.3:
                await asyncio.sleep(0)

    async def consume(self) -> None:
        overflow: Any = self.random.choice(["wait", "wait", "drop_oldest", "drop_newest", "latest"])
        deadline = self.random.choice([None, None, 0.001, 1.0])
        on_error: Any = self.random.choice(["raise", "skip", lambda frame, error: None])
        leave = self.random.choice([None, 3, 30])
        run = self.pipeline.run(self.source(), overflow=overflow, deadline=deadline, on_error=on_error)
        last = -1
        async with run:
            try:
                async for pred in run:
                    assert last < pred.index == pred.key == int(pred.output[0])
                    assert pred.output[1] == pred.output[2]  # one version of the weights
                    last = pred.index
                    if last == leave:
                        break
                    if self.random.random() < 0.1:
                        await asyncio.sleep(0)
            except StageError:
                assert on_error == "raise"
        stats = run.stats()
        assert stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed

    async def request(self) -> None:
        value = self.random.choice([-1.0, 5.0, 6.0, 7.0])
        try:
            answer = await self.pipeline.submit(self.sample(value), deadline=self.random.choice([None, 0.002, 1.0]))
            assert answer.output[0] == value >= 0
        except StageError:
            assert value < 0
        except DeadlineExceeded:
            pass

    async def swap(self) -> None:
        self.version += 1
        await self.pipeline.load_state_dict({key: torch.tensor([self.version]) for key in ("a.w", "b.w")})

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.5:
            self.start(self.request())
        elif choice < 0.6:
            self.start(self.consume())
        elif choice < 0.7:
            self.start(self.swap())
        elif choice < 0.8:
            self.pipeline.set_budget(
                frames=self.random.choice([None, 1, 3, 20]), nbytes=self.random.choice([None, 4, 1000])
            )
        elif choice < 0.85:
            self.pipeline.pause()
        elif choice < 0.9:
            self.pipeline.resume()
        elif self.tasks:
            self.random.choice(sorted(self.tasks, key=lambda task: task.get_name())).cancel()

    def start(self, coroutine: Any) -> None:
        if len(self.tasks) > 200:
            coroutine.close()
            return
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.finished)

    def finished(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # the loop's exception handler: the test fails


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(2))
async def test_soak(seed: int) -> None:
    """After a random hour no credit, frame, run, task or thread is left, and every frame has ended exactly once."""
    stages = [Stage(check, name="check"), Stage(Weight(), name="a"), Stage(Weight(), name="b", workers=3)]
    async with Pipeline.from_stages(stages) as pipeline:
        soak = Soak(pipeline, seed)
        loop = asyncio.get_running_loop()
        until = loop.time() + SECONDS
        while loop.time() < until:
            soak.step()
            for _ in range(soak.random.randrange(4)):
                await asyncio.sleep(0)
        pipeline.resume()
        for task in list(soak.tasks):
            if soak.random.random() < 0.5:
                task.cancel()
        async with asyncio.timeout(20):
            while soak.tasks:
                await asyncio.wait(soak.tasks)
            await pipeline.drain()
        engine = pipeline._engine
        assert engine is not None
        assert (engine.door.used, engine.door.used_bytes, engine.door.waiting) == (0, 0, 0)
        assert (engine.frames, engine.runs, pipeline._leases) == (set(), set(), 0)
        assert all(stage.inbox.statistics().occupancy == 0 for stage in engine.stages)
        stats = pipeline.stats()
        assert stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed == len(soak.acks)
        await asyncio.sleep(0)
        assert all(len(acks) == 1 for acks in soak.acks)
