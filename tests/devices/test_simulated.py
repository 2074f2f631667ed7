"""Tests of aiotime.devices.simulated: exact virtual time, scaling, and the contract of a device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotime import Pipeline, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Work
from aiotime.errors import ClosedError, ConfigurationError, StageError, StageTimeout
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.conftest import Settle

Seconds = float | Callable[[Work, Frame], float]


def same(x: Any) -> Any:
    return x


def chain(*seconds: Seconds, depth: int = 4, **options: Any) -> tuple[Pipeline, VirtualClock]:
    """A pipeline of simulated devices, one stage each, that take ``seconds``."""
    clock = VirtualClock()
    stages = [
        Stage(same, device=SimulatedDevice(k, seconds=s, clock=clock), name=f"s{k}") for k, s in enumerate(seconds)
    ]
    return Pipeline.from_stages(stages, depth=depth, **options), clock


async def elapsed(*seconds: Seconds, frames: int, depth: int = 4) -> float:
    """Virtual seconds that ``frames`` frames take, from the first's arrival to the last's result."""
    pipeline, clock = chain(*seconds, depth=depth)
    start = clock.now()
    count = 0
    async for pred in pipeline.run(range(frames)):
        assert pred.output == pred.index == count
        count += 1
    assert count == frames
    return clock.now() - start


# ------------------------------------------------------------------------------------------------------- clock


@pytest.mark.asyncio
async def test_the_clock_runs_actions_in_order_at_their_instants(settle: Settle) -> None:
    """Actions run at exactly their virtual time, those of one instant in the order given; none lies in the past."""
    clock = VirtualClock()
    log: list[tuple[str, float]] = []
    for name, when in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("past", -5.0)):
        clock.call_at(when, lambda name=name: log.append((name, clock.now())))  # type: ignore[misc]
    await settle(until=lambda: len(log) == 4)
    assert log == [("past", 0.0), ("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert clock.now() == 2.0


@pytest.mark.asyncio
async def test_a_clock_moved_by_hand_stands_still(settle: Settle) -> None:
    """With auto=False time moves by `advance` alone, and runs what falls due on the way."""
    clock = VirtualClock(auto=False)
    log: list[float] = []
    clock.call_at(1.0, lambda: log.append(clock.now()))
    await settle(200)
    assert log == []
    clock.advance(0.5)
    assert (log, clock.now()) == ([], 0.5)
    clock.advance(1.0)
    assert (log, clock.now()) == ([1.0], 1.5)


def test_a_clock_outlives_a_loop_that_was_left_in_the_middle() -> None:
    """What was due on a loop that is gone never happens, and time moves on the next loop."""
    clock = VirtualClock()

    async def leave() -> None:
        clock.call_at(1.0, lambda: pytest.fail("ran on a dead loop"))

    async def wait() -> float:
        future = asyncio.get_running_loop().create_future()
        clock.call_at(2.0, lambda: future.set_result(clock.now()))
        return float(await asyncio.wait_for(future, 5))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert asyncio.run(wait()) == 2.0


# ----------------------------------------------------------------------------------------------------- scaling


@pytest.mark.asyncio
@pytest.mark.parametrize(("devices", "frames", "factor"), [(2, 400, 1.99), (8, 800, 7.9), (64, 4096, 63.0)])
async def test_equal_stages_scale(devices: int, frames: int, factor: float) -> None:
    """N equal stages on N devices are (almost) N times as fast as all the work on one device."""
    spread = await elapsed(*[1.0] * devices, frames=frames)
    assert devices * frames / spread >= factor
    assert spread == frames + devices - 1  # to the tick: the pipeline fills, then a frame a second


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [(1.0, 3.0, 2.0), (0.5, 0.25, 0.125, 4.0), (7.0, 1.0)])
async def test_unequal_stages_run_at_the_pace_of_the_slowest(seconds: tuple[float, ...]) -> None:
    """The time is exactly the filling plus one slowest stage a frame: throughput 1/slowest to 1 %."""
    frames = 400
    spent = await elapsed(*seconds, frames=frames)
    assert spent == sum(seconds) + (frames - 1) * max(seconds)
    assert frames / spent == pytest.approx(1 / max(seconds), rel=0.01)


@pytest.mark.asyncio
async def test_workers_multiply_a_stage() -> None:
    """Three workers make a slow stage three times as fast."""
    clock = VirtualClock()
    slow = Stage(same, device=SimulatedDevice(0, seconds=3.0, clock=clock), workers=3)
    fast = Stage(same, device=SimulatedDevice(1, seconds=1.0, clock=clock))
    got = [pred.index async for pred in Pipeline.from_stages([slow, fast], depth=4).run(range(30))]
    assert got == list(range(30))
    assert clock.now() == 3.0 * 10 + 3.0  # 10 rounds of three, the last of which leave one a second


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12))
def test_time_is_that_of_the_recurrence(table: list[list[int]]) -> None:
    """Each start is the later of the device's being free and the frame's being there, whatever the durations."""

    def seconds(work: Work, frame: Frame) -> float:
        return float(table[frame.index][work.index])

    free = [0.0] * 3
    for row in table:
        there = 0.0
        for stage, spent in enumerate(row):
            there = free[stage] = max(there, free[stage]) + spent
    assert asyncio.run(elapsed(seconds, seconds, seconds, frames=len(table), depth=50)) == free[-1]


# ---------------------------------------------------------------------------------------------------- contract


@pytest.mark.asyncio
async def test_errors_time_outs_and_their_frames() -> None:
    """A function that raises fails its frame at its end; one that would take too long fails at its time-out."""
    clock = VirtualClock()

    def seconds(work: Work, frame: Frame) -> float:
        return 100.0 if frame.index == 2 else 1.0

    def fails_at_one(x: int) -> int:
        if x == 1:
            raise ValueError("one")
        return x

    stage = Stage(fails_at_one, device=SimulatedDevice(0, seconds=seconds, clock=clock), name="s", timeout=5.0)
    errors: list[Exception] = []
    run = Pipeline.from_stages([stage], depth=2).run(range(5), on_error=lambda frame, error: errors.append(error))
    assert [pred.index async for pred in run] == [0, 3, 4]
    assert [type(error) for error in errors] == [StageError, StageTimeout]
    assert clock.now() == 1 + 1 + 5 + 1 + 1


@pytest.mark.asyncio
async def test_closing_takes_no_more_and_finishes_what_runs(settle: Settle) -> None:
    """A closed pipeline refuses its frames; the jobs on the device end in virtual time, and so does the closing."""
    pipeline, clock = chain(1000.0, 1000.0)
    async with pipeline:
        answers = [asyncio.create_task(pipeline.submit(i)) for i in range(3)]
        await settle(3)
    assert [type(x) for x in await asyncio.gather(*answers, return_exceptions=True)] == [ClosedError] * 3
    assert clock.now() in (0.0, 1000.0)


@pytest.mark.asyncio
async def test_new_weights_wait_until_every_worker_is_free() -> None:
    """A swap waits for the frames before it on all workers, and the frames behind it wait for the swap."""

    class Weight(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.w

    clock = VirtualClock()
    device = SimulatedDevice(0, seconds=lambda work, frame: 10.0 if clock.now() == 0.0 else 1.0, clock=clock)
    async with Pipeline.from_stages([Stage(Weight(), device=device, name="s", workers=3)], depth=4) as pipeline:
        old = asyncio.create_task(pipeline.submit(torch.zeros(1)))
        await asyncio.sleep(0)
        swap = asyncio.create_task(pipeline.load_state_dict({"s.w": torch.ones(1)}))
        await asyncio.sleep(0)
        new = [asyncio.create_task(pipeline.submit(torch.zeros(1))) for _ in range(3)]
        assert (await old).output.item() == 0.0
        await swap
        assert clock.now() == 10.0
        assert [(await answer).output.item() for answer in new] == [1.0] * 3
        assert clock.now() == 11.0


@pytest.mark.asyncio
async def test_another_thread_may_ring() -> None:
    """A simulated stage behind a CPU stage starts when a worker thread settles its upstream."""
    clock = VirtualClock()
    threads: list[threading.Thread] = []

    def real(x: int) -> int:
        threads.append(threading.current_thread())
        return x + 1

    stages = [Stage(real, device="cpu:0"), Stage(same, device=SimulatedDevice(0, seconds=1.0, clock=clock))]
    got = [pred.output async for pred in Pipeline.from_stages(stages, depth=3).run(range(20))]
    assert got == list(range(1, 21))
    assert clock.now() >= 20.0
    assert threading.current_thread() not in threads


def test_nonsense_is_refused() -> None:
    """Negative durations, and two clocks in one pipeline, are refused."""
    with pytest.raises(ConfigurationError, match="seconds"):
        SimulatedDevice(0, seconds=-1.0, clock=VirtualClock())
    stages = [Stage(same, device=SimulatedDevice(k, seconds=1.0, clock=VirtualClock())) for k in range(2)]
    with pytest.raises(ConfigurationError, match="share one VirtualClock"):
        Pipeline.from_stages(stages)


def test_measuring_returns_the_stated_time() -> None:
    """The planner is told what the device was made with."""
    clock = VirtualClock()
    device = SimulatedDevice(3, seconds=0.5, clock=clock)
    assert device.measure(str, 7) == (0.5, "7")
    assert SimulatedDevice(3, seconds=lambda work, frame: 2.0, clock=clock).measure(str, 7) == (1.0, "7")
    assert device.transfer_seconds(100, device) == 0.0
    assert device.place("module") == "module"
    assert repr(device) == "SimulatedDevice('sim:3')"


@pytest.mark.asyncio
async def test_sleeping_on_the_virtual_clock_takes_virtual_time() -> None:
    """``sleep`` wakes at its tick, also beside a sleeper that was cancelled."""
    clock = VirtualClock()
    cancelled = asyncio.ensure_future(clock.sleep(1.0))
    await asyncio.sleep(0)
    cancelled.cancel()
    await clock.sleep(2.5)
    assert clock.now() == 2.5
    assert cancelled.cancelled()
