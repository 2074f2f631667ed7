"""Cancelling at the k-th await, for every k: nothing is lost, nothing is left, and what follows works.

A scenario is run again and again, cancelled at its first suspension, at its second, and so on until it gets through;
once with the future it waits for cancelled at once, and once with the cancellation meeting a result that has just come.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.errors import StageError
from tests.scenarios import for_every_k

if TYPE_CHECKING:
    from tests.conftest import Settle


class Weight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.w])


def simulated(clock: VirtualClock, k: int) -> SimulatedDevice:
    return SimulatedDevice(k, seconds=1.0 + k, clock=clock)


def chain(kind: str, *fns: Callable[[Any], Any], **options: Any) -> Pipeline:
    clock = VirtualClock()
    devices = [simulated(clock, k) if kind == "simulated" else f"cpu:{k}" for k in range(len(fns))]
    stages = [Stage(fn, device=device, name=f"s{k}") for k, (fn, device) in enumerate(zip(fns, devices, strict=True))]
    return Pipeline.from_stages(stages, **{"depth": 2, **options})


def plus(x: int) -> int:
    return x + 1


def closed() -> bool:
    """No closing that was cancelled goes on in the background."""
    return not [task for task in asyncio.all_tasks() if task.get_name().startswith("close:")]


def empty(pipeline: Pipeline) -> bool:
    engine = pipeline._engine
    return engine is None or not (engine.door.used or engine.frames or engine.door.full or engine.runs)


both = pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
kinds = pytest.mark.parametrize("kind", ["simulated", "cpu"])


class Tape:
    """An endless source; every frame it gave must have been acknowledged once in the end."""

    def __init__(self) -> None:
        self.acks: list[list[BaseException | None]] = []
        self.open = 0

    async def __aiter__(self) -> AsyncIterator[Sample]:
        self.open += 1
        try:
            while True:
                self.acks.append([])
                yield Sample(len(self.acks) - 1, ack=self.acks[-1].append)
        finally:
            self.open -= 1

    def check(self) -> None:
        assert not self.open
        assert all(len(acks) == 1 for acks in self.acks)


@pytest.mark.asyncio
@both
@kinds
async def test_a_consumer(kind: str, late: bool, settle: Settle) -> None:
    """Cancelled anywhere between opening a run and leaving it: credits back, source closed, others served."""
    async with chain(kind, plus, plus) as pipeline:
        tapes: list[Tape] = []

        async def scenario() -> None:
            tapes.append(Tape())
            async with pipeline.run(tapes[-1]) as run:
                async for pred in run:
                    assert pred.output == pred.index + 2
                    if pred.index == 6:
                        break

        assert await for_every_k(scenario, late=late) > 3
        await asyncio.wait_for(pipeline.drain(), 20)
        pipeline.resume()
        await settle(until=lambda: empty(pipeline))  # a close that was cancelled goes on in the background
        for tape in tapes:
            tape.check()
        assert (await pipeline.submit(1)).output == 3
        stats = pipeline.stats()
        assert stats.frames_in == stats.frames_out + stats.frames_shed


@pytest.mark.asyncio
@both
@kinds
async def test_a_consumer_that_goes_on(kind: str, late: bool) -> None:
    """A consumer cancelled at any await of ``anext`` and then resumed gets every frame, once and in order."""
    async with chain(kind, plus, plus) as pipeline:

        async def scenario() -> None:
            got: list[int] = []
            run = pipeline.run(range(8))
            cancelled = False
            async with run:
                while True:
                    try:
                        got.append((await anext(run)).index)
                    except StopAsyncIteration:
                        break
                    except asyncio.CancelledError:
                        task = asyncio.current_task()
                        assert task is not None
                        task.uncancel()
                        cancelled = True
            assert got == list(range(8))
            if cancelled:
                raise asyncio.CancelledError  # told to for_every_k: there may be more suspensions

        assert await for_every_k(scenario, late=late) > 2
        assert empty(pipeline)


@pytest.mark.asyncio
@both
@kinds
async def test_a_run_that_fails(kind: str, late: bool, settle: Settle) -> None:
    """Cancelled anywhere in a run that ends with an error; nothing is left, no error is unhandled."""

    def bad(x: int) -> int:
        if x == 4:
            raise ValueError("boom")
        return x

    async with chain(kind, plus, bad) as pipeline:

        async def scenario() -> None:
            run = pipeline.run(range(1000))
            try:
                async for _ in run:
                    pass
            except StageError as error:
                assert error.frame == 3  # noqa: PT017 - the run may also be cancelled
            finally:
                await run.aclose()

        await for_every_k(scenario, late=late)
        await settle(until=lambda: empty(pipeline))
        assert (await pipeline.submit(1)).output == 2


@pytest.mark.asyncio
@both
@kinds
async def test_a_request(kind: str, late: bool) -> None:
    """A request cancelled at any await gives back its credit, is acknowledged once and counted once."""
    async with chain(kind, plus, plus, budget=1) as pipeline:
        acks: list[list[BaseException | None]] = []

        async def scenario() -> None:
            mine: list[list[BaseException | None]] = [[], []]
            acks.extend(mine)
            first = asyncio.ensure_future(pipeline.submit(Sample(1, ack=mine[0].append)))
            try:
                assert (await pipeline.submit(Sample(2, ack=mine[1].append))).output == 4
            finally:
                await asyncio.shield(asyncio.wait([first]))

        assert await for_every_k(scenario, late=late) >= 2
        await asyncio.wait_for(pipeline.drain(), 20)
        await asyncio.sleep(0)
        assert empty(pipeline)
        assert all(len(mine) == 1 for mine in acks)
        stats = pipeline.stats()
        assert stats.frames_in == len(acks) == stats.frames_out + stats.frames_shed


@pytest.mark.asyncio
@both
@kinds
async def test_aclose_of_a_run(kind: str, late: bool) -> None:
    """aclose cancelled at any await goes on in the background; a second aclose waits for it."""
    async with chain(kind, plus, plus) as pipeline:

        async def scenario() -> None:
            tape = Tape()
            run = pipeline.run(tape)

            async def first() -> None:
                async for _ in run:
                    return

            try:
                await asyncio.shield(asyncio.ensure_future(first()))
                await run.aclose()
            finally:
                await asyncio.shield(asyncio.ensure_future(run.aclose()))
                assert empty(pipeline)
                tape.check()

        await for_every_k(scenario, late=late)


@pytest.mark.asyncio
@both
async def test_load_state_dict(late: bool) -> None:
    """A swap cancelled at any await is whole: frames see the old weights everywhere or the new ones everywhere."""
    stages = [Stage(Weight(), name="a"), Stage(Weight(), name="b", workers=2)]
    async with Pipeline.from_stages(stages, depth=2) as pipeline:
        version = 0

        async def scenario() -> None:
            nonlocal version
            version += 1
            await pipeline.load_state_dict({key: torch.full((1,), float(version)) for key in ("a.w", "b.w")})

        assert await for_every_k(scenario, late=late) >= 2
        seen = Counter((await pipeline.submit(torch.empty(0))).output.tolist())
        assert len(seen) == 1
        assert empty(pipeline)


@pytest.mark.asyncio
@both
@kinds
async def test_async_with_pipeline(kind: str, late: bool, settle: Settle) -> None:
    """Opening, using and closing a pipeline cancelled at any await leaves no task and no thread; it opens again."""
    pipeline = chain(kind, plus, plus)

    async def scenario() -> None:
        async with pipeline:
            assert (await pipeline.submit(1)).output == 3

    assert await for_every_k(scenario, late=late) > 2
    async with pipeline:
        assert (await pipeline.submit(1)).output == 3
    await settle(until=closed)


@pytest.mark.asyncio
@both
async def test_async_with_pipeline_that_warms_up(late: bool, settle: Settle) -> None:
    """The same with a warm-up in between."""
    pipeline = await asyncio.to_thread(
        Pipeline,
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()),
        example=torch.zeros(1, 2),
        devices=["cpu:0", "cpu:1"],
        balance="even",
        warm_up=2,
    )

    async def scenario() -> None:
        async with pipeline:
            await pipeline.submit(torch.zeros(1, 2))

    assert await for_every_k(scenario, late=late) > 3
    await settle(until=closed)


@pytest.mark.asyncio
@both
@kinds
async def test_drain(kind: str, late: bool) -> None:
    """A drain cancelled at any await leaves a pipeline that drains at the next call, with every answer given."""
    async with chain(kind, plus, plus, budget=2) as pipeline:

        async def scenario() -> None:
            requests = [asyncio.ensure_future(pipeline.submit(i)) for i in range(5)]
            await asyncio.sleep(0)
            try:
                await pipeline.drain()
            finally:
                await asyncio.shield(asyncio.ensure_future(pipeline.drain()))
                assert all(request.done() for request in requests) or empty(pipeline)
                answers = await asyncio.shield(asyncio.gather(*requests, return_exceptions=True))
                assert len(answers) == 5
                pipeline.resume()

        await for_every_k(scenario, late=late)
        assert empty(pipeline)
