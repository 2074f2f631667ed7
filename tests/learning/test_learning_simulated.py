"""Schedules to the exact tick: forward 1, backward 2, on a virtual clock; who waits, and how late gradients are.

S = 4, 1f1b     stage 0   F0 F1 F2 F3 ·  ·  ·  ·  ·  B0 .. F4 B1 .. F5 …     N frames take 3 (N + S - 1)
                stage 3   ·  ·  ·  F0 B0 .. F1 B1 .. F2 B2 .. F3 …
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Work
from aiotime.frame import Frame
from aiotime.learning import Delayed, Exact
from aiotime.learning.learner import StageLearner
from aiotime.learning.rule import Rule

on_asyncio = pytest.mark.asyncio(loop_factories=["asyncio"])  # virtual time knows no loop
PHASES = {"forward": 0, "backward": 1, "weights": 2}


class Scale(nn.Module):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).sum()


def rule(order: str) -> Rule:
    settings: dict[str, Any] = {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=1e-3), "idle": None}
    return Exact(**settings) if order == "exact" else Delayed(order=order, **settings)  # type: ignore[arg-type]


class Course:
    """A pipeline whose stage k takes ``forward[k]`` and ``backward[k]`` seconds; what happened when."""

    def __init__(
        self, forward: Sequence[float], backward: Sequence[float], order: str, *, devices: Sequence[int] | None = None
    ) -> None:
        self.clock = VirtualClock()
        self.log: list[tuple[float, int, str, int]] = []  # (begin, stage, phase, frame)

        def seconds(work: Work, frame: Frame) -> float:
            self.log.append((self.clock.now(), work.index, work.phase, frame.index))
            return (forward[work.index], backward[work.index], 0.0)[PHASES[work.phase]]

        places = devices or range(len(forward))
        made = {at: SimulatedDevice(at, seconds=seconds, clock=self.clock) for at in set(places)}
        stages = [Stage(Scale(), device=made[at], name=f"s{k}") for k, at in enumerate(places)]
        self.make = partial(Pipeline.from_stages, stages, learner=rule(order))
        self.delays: list[tuple[int, ...]] = []

    async def run(self, frames: int, *, every: float = 0.0, targets: Sequence[bool] | None = None) -> float:
        """Virtual seconds until all is learned; a frame each ``every`` seconds."""
        start = self.clock.now()
        self.pipeline = await asyncio.to_thread(self.make)  # PyTorch imports with the first optimizer

        async def source() -> AsyncIterator[Sample]:
            for i in range(frames):
                yield Sample(torch.ones(1), torch.zeros(1) if targets is None or targets[i] else None)
                if every:
                    await self.clock.sleep(every)

        async with asyncio.timeout(50):
            async for pred in self.pipeline.run(source()):
                assert pred.delay is not None
                self.delays.append(pred.delay)
        return self.clock.now() - start

    @property
    def learned(self) -> list[int]:
        return [spec.hands.learned for spec in self.pipeline._specs if isinstance(spec.hands, StageLearner)]


def equal(stages: int, order: str) -> Course:
    return Course([1.0] * stages, [2.0] * stages, order)


# ---------------------------------------------------------------------- equal stages


@on_asyncio
@pytest.mark.parametrize("order", ["event", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
async def test_equal_stages_learn_a_frame_every_three_ticks(stages: int, order: str) -> None:
    """3 N on the top stage, S-1 forwards before it and S-1 backwards behind it: 3 (N + S - 1), and no tick more."""
    course = equal(stages, order)
    assert await course.run(40) == 3 * (40 + stages - 1)
    assert course.learned == [40] * stages


@on_asyncio
async def test_eight_stages_are_7_8_times_as_fast_as_one() -> None:
    """Over 280 frames, as one device takes 8 x as long for 8 stages: N S / (N + S - 1)."""
    one, eight = await equal(1, "event").run(280), await equal(8, "event").run(280)
    assert one == 3 * 280
    assert 8 * one / eight == 280 * 8 / 287 >= 7.8


@on_asyncio
async def test_exact_learning_keeps_one_stage_busy_at_a_time() -> None:
    """3 S per frame: the yardstick."""
    course = equal(4, "exact")
    assert await course.run(20) == 3 * 4 * 20
    assert set(course.delays) == {(0, 0, 0, 0)}


@on_asyncio
@pytest.mark.parametrize(("order", "factor"), [("1f1b", 1), ("lockstep", 2)])
async def test_strict_orders_alternate(order: str, factor: int) -> None:
    """Stage k goes forward d + 1 times, then backward and forward in turn; delays are exactly min(i, d)."""
    course = equal(4, order)
    await course.run(20)
    for k in range(4):
        d = factor * (3 - k)
        phases = [phase[0] for _, stage, phase, _ in course.log if stage == k]
        assert "".join(phases) == "f" * d + "fb" * (20 - d) + "b" * d
        assert [delay[k] for delay in course.delays] == [min(i, d) for i in range(20)]


@on_asyncio
async def test_event_order_is_1f1b_where_stages_are_equal_and_the_stream_is_fast() -> None:
    """The same jobs at the same ticks."""
    logs = []
    for order in ("event", "1f1b"):
        course = equal(4, order)
        await course.run(20)
        logs.append(sorted(course.log))
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------- unequal stages

UNEQUAL = [
    ([1, 2, 1, 1], [2, 2, 2, 2]),
    ([1, 1, 1, 1], [1, 4, 1, 2]),
    ([3, 1, 1, 1], [1, 1, 1, 1]),
    ([1, 1, 1, 3], [1, 1, 1, 3]),
    ([1, 1, 2, 1], [2, 2, 4, 2]),
    ([2, 1, 1, 1], [4, 2, 2, 2]),
]


@on_asyncio
@pytest.mark.parametrize(("forward", "backward"), UNEQUAL, ids=str)
async def test_the_slowest_stage_sets_the_pace(forward: list[float], backward: list[float]) -> None:
    """1 / max(F + B) frames per second in every order: no stage that could work waits for one that is faster.

    A backward whenever there is one would not do: two in a row leave the stages above without frames (up to 25 %).
    """
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    for order in ("event", "1f1b", "lockstep"):
        short, long = [await Course(forward, backward, order).run(frames) for frames in (30, 60)]
        assert (long - short) / 30 == slowest, order


@on_asyncio
async def test_event_order_takes_what_is_there() -> None:
    """A hiccup of one stage: a strict order waits in line, event order goes on; both learn from everything once."""
    times = {}
    for order in ("event", "lockstep"):
        clock = VirtualClock()

        def seconds(work: Work, frame: Frame) -> float:
            slow = work.index == frame.index % 3 and work.phase == "backward"
            return 4.0 if slow else 1.0

        stages = [Stage(Scale(), device=SimulatedDevice(k, seconds=seconds, clock=clock)) for k in range(3)]
        pipeline = await asyncio.to_thread(Pipeline.from_stages, stages, learner=rule(order))
        count = 0
        async for _ in pipeline.run([Sample(torch.ones(1), torch.zeros(1))] * 60):
            count += 1
        assert count == 60
        times[order] = clock.now()
    assert times["event"] <= times["lockstep"]


# ---------------------------------------------------------------------- slower streams


@on_asyncio
async def test_a_stream_that_leaves_time_has_less_delay() -> None:
    """Event order: at half load below S-1-k, once a frame is through before the next comes none; 1f1b: always S-1-k."""
    half, quarter, strict = equal(4, "event"), equal(4, "event"), equal(4, "1f1b")
    await half.run(20, every=6.0)
    assert set(half.delays[2:]) <= {(1, 1, 0, 0), (1, 0, 0, 0)}
    await quarter.run(20, every=12.0)  # 4 forwards and 4 backwards
    assert set(quarter.delays) == {(0, 0, 0, 0)}
    await strict.run(20, every=12.0)
    assert set(strict.delays[3:]) == {(3, 2, 1, 0)}


@on_asyncio
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep", "exact"])
async def test_frames_without_a_target_pass_at_once(order: str) -> None:
    """They take their forward's time alone: the run is shorter by their backwards."""
    targets = [i % 2 == 0 for i in range(40)]
    course = equal(2, order)
    seconds = await course.run(40, targets=targets)
    assert course.learned == [20, 20]
    if order == "exact":  # they see every earlier update, and overlap with the next frame alone
        assert set(course.delays) == {(0, 0)}
        assert seconds == 20 * (2 * 3) + 20 * 1 + 1
    else:
        assert seconds <= 3 * 20 + 20 * 1 + 12


# ---------------------------------------------------------------------- several stages on one device


@on_asyncio
@pytest.mark.parametrize("order", ["event", "1f1b", "lockstep", "exact"])
@pytest.mark.parametrize("devices", [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]], ids=str)
async def test_stages_that_share_a_device_share_its_time(order: str, devices: list[int]) -> None:
    """Never faster than the device's work, never stuck; on one device there is no gap at all."""
    course = Course([1.0] * 4, [2.0] * 4, order, devices=devices)
    seconds = await course.run(20)
    assert course.learned == [20] * 4
    work = 3 * 20 * max(devices.count(at) for at in set(devices))
    if len(set(devices)) == 1:
        assert seconds == work
    else:
        assert seconds >= work
    if order in ("event", "1f1b"):
        assert seconds <= work + 3 * 4 + 3


@on_asyncio
async def test_on_one_device_event_order_has_no_delay() -> None:
    """Whatever can be learned is learned before the next frame: nothing is gained by letting it wait."""
    course = Course([1.0] * 4, [2.0] * 4, "event", devices=[0, 0, 0, 0])
    await course.run(10)
    assert set(course.delays) == {(0, 0, 0, 0)}
