"""Batched or not, the frames have the same outcomes: any schedule, shapes, failures, cancellations, deadlines, devices.

Hypothesis chooses what waits together; the outcome of a frame may depend on its own value alone.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Work
from aiotime.engine import Engine
from aiotime.errors import FrameShed, StageError
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.properties.conftest import Play

FRAMES = 16


@dataclass
class Scene:
    """A pipeline of batching and plain stages, and what its frames are."""

    kinds: list[tuple[int, float, int]]  # per stage: max_batch, max_wait, workers
    shared: bool  # the stages share a device where they can
    seconds: list[list[int]]  # per stage, cycled over the frames: of a job that begins with it
    widths: list[int]  # cycled over the frames
    sizes: list[int]  # rows, cycled over the frames
    failing: set[int]  # values that the middle stage refuses
    depth: int | None
    budget: int | None
    group: Any

    def pipeline(self, *, batched: bool) -> Pipeline:
        clock = VirtualClock()

        def device(k: int) -> SimulatedDevice:
            def seconds(work: Work, frame: Frame) -> float:
                table = self.seconds[k]
                return float(table[frame.index % len(table)])

            return SimulatedDevice(k, seconds=seconds, clock=clock)

        def fn(k: int) -> Any:
            def compute(x: torch.Tensor) -> torch.Tensor:
                assert x.dim() == (3 if self.group == "stack" and batched and self.kinds[k][0] > 1 else 2)
                if k == 1 and set(x.flatten().tolist()) & self.failing:
                    raise ValueError("boom")
                return x + 100 * (k + 1)

            return compute

        first = device(0)
        stages = []
        for k, (most, wait, workers) in enumerate(self.kinds):
            batching: dict[str, Any] = {}
            if batched and most > 1:
                batching = {"max_batch": most, "max_wait": wait, "group": self.group}
            place = first if self.shared and workers == 1 else device(k)
            stages.append(Stage(fn(k), device=place, workers=workers, name=f"s{k}", **batching))
        return Pipeline.from_stages(stages, depth=self.depth, budget=self.budget)

    def payload(self, i: int) -> torch.Tensor:
        rows = self.sizes[i % len(self.sizes)] if self.group == "cat" else 1
        return torch.full((rows, self.widths[i % len(self.widths)]), float(i))

    def right(self, i: int, output: torch.Tensor) -> bool:
        return torch.equal(output, self.payload(i) + 100 * sum(range(1, len(self.kinds) + 1)))


kinds = st.tuples(st.integers(1, 5), st.sampled_from([0.0, 0.0, 1.5, 7.0]), st.integers(1, 3))
scenes = st.builds(
    Scene,
    kinds=st.lists(kinds, min_size=3, max_size=3),
    shared=st.booleans(),
    seconds=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=3, max_size=3),
    widths=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    failing=st.sets(st.integers(0, FRAMES - 1), max_size=3).map(lambda found: {100 + i for i in found}),
    depth=st.none() | st.integers(1, 6),
    budget=st.none() | st.integers(1, 10),
    group=st.sampled_from(["cat", "stack"]),
)


@settings(max_examples=60)
@given(scene=scenes)
def test_batches_change_nothing_but_the_time(play: Play, scene: Scene) -> None:
    """Same outputs in the same order, same failures by the same frames, each acknowledged once."""
    seen: list[list[tuple[int, torch.Tensor]]] = []
    failures: list[list[int]] = []

    async def scenario(batched: bool) -> None:
        acks: list[list[BaseException | None]] = [[] for _ in range(FRAMES)]
        source = [Sample(scene.payload(i), ack=acks[i].append) for i in range(FRAMES)]
        pipeline = scene.pipeline(batched=batched)
        async with pipeline:
            run = pipeline.run(source, on_error="skip")
            seen.append([(pred.index, pred.output) async for pred in run])
            engine = run._state.engine
            assert isinstance(engine, Engine)
            assert (engine.door.used, engine.frames) == (0, set())
            stats = pipeline.stats()
            assert [stage.frames for stage in stats.stages] == [FRAMES, FRAMES, stats.frames_out]
            assert stats.stages[1].failed == stats.frames_failed == FRAMES - stats.frames_out
        assert all(len(found) == 1 for found in acks)
        failures.append([i for i, [error] in enumerate(acks) if isinstance(error, StageError)])

    play(scenario(False))
    play(scenario(True))
    plain, batched = seen
    assert [index for index, _ in plain] == [index for index, _ in batched]
    assert failures[0] == failures[1] == [i for i in range(FRAMES) if 100 + i in scene.failing]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(plain, batched, strict=True))


@settings(max_examples=60)
@given(
    scene=scenes,
    deadline=st.none() | st.floats(0.5, 12.0),
    leave=st.none() | st.integers(0, FRAMES),
    cancelled=st.sets(st.integers(0, 7), max_size=4),
    turns=st.integers(0, 60),
)
def test_neighbours_are_not_disturbed(
    play: Play, scene: Scene, deadline: float | None, leave: int | None, cancelled: set[int], turns: int
) -> None:
    """One run expires or is left, requests are cancelled: each frame of the others has its own right answer."""
    pipeline = scene.pipeline(batched=True)

    async def hurried() -> None:
        run = pipeline.run([scene.payload(i) for i in range(FRAMES)], on_error="skip", deadline=deadline)
        async with run:
            count = 0
            async for pred in run:
                assert scene.right(pred.index, pred.output)
                count += 1
                if count == leave:
                    break
        stats = run.stats()
        assert stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed

    async def steady() -> None:
        run = pipeline.run([scene.payload(i) for i in range(FRAMES)], on_error="skip")
        came = [(pred.index, scene.right(pred.index, pred.output)) async for pred in run]
        assert came == [(i, True) for i in range(FRAMES) if 100 + i not in scene.failing]

    async def ask(i: int) -> None:
        try:
            assert scene.right(i, (await pipeline.submit(scene.payload(i))).output)
        except StageError:
            assert 100 + i in scene.failing
        except FrameShed:
            assert i in cancelled

    async def scenario() -> None:
        async with pipeline:
            requests = [asyncio.ensure_future(ask(i)) for i in range(8)]
            runs = [asyncio.ensure_future(each) for each in (hurried(), steady())]
            for _ in range(turns):
                await asyncio.sleep(0)
            for i in cancelled:
                requests[i].cancel()
            await asyncio.wait(requests)
            for i, request in enumerate(requests):
                if request.cancelled():
                    assert i in cancelled
                else:
                    request.result()
            await asyncio.gather(*runs)
            await pipeline.drain()
            engine = pipeline._engine
            assert engine is not None
            assert (engine.door.used, engine.frames, engine.runs) == (0, set(), set())
            assert not any(stage.inbox.items for stage in engine.stages)

    play(scenario())


@settings(max_examples=25)
@given(
    most=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    wait=st.sampled_from([0.0, 0.0005]),
    devices=st.sampled_from(
        [["cpu:0", "cpu:1", "cpu:2"], ["cpu:0"] * 3, ["inline", "cpu:0", "inline"], ["inline"] * 3]
    ),
    failing=st.sets(st.integers(0, 39), max_size=4),
    workers=st.sampled_from([1, 1, 3]),
)
def test_on_threads(
    play: Play, most: list[int], wait: float, devices: list[str], failing: set[int], workers: int
) -> None:
    """The same on real threads and on the loop."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        if set(x.flatten().tolist()) & failing:
            raise ValueError("boom")
        return x + 100

    stages = [
        Stage(
            fn,
            device=device,
            max_batch=number,
            max_wait=wait if number > 1 else 0.0,
            workers=1 if device == "inline" else workers,
        )
        for number, device in zip(most, devices, strict=False)
    ]
    pipeline = Pipeline.from_stages(stages)

    async def scenario() -> None:
        run = pipeline.run([torch.full((1, 1), float(i)) for i in range(40)], on_error="skip")
        outputs = [int(pred.output) async for pred in run]
        assert outputs == [i + 100 * len(most) for i in range(40) if i not in failing]
        assert run.stats().frames_failed == len(failing)

    play(scenario())
