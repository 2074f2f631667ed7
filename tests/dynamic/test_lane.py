"""What a device stream does next: backward before forward, the fullest batch, patience, and nobody starved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from tests.conftest import Settle
from tests.dynamic.nets import SGD, Coded, check_empty, linear, taught


def logged(clock: VirtualClock, log: list[tuple[str, str, int, float]]) -> Callable[[Any, Any], float]:
    """Seconds of every job: 1; each is noted as (phase, stage, calls, when it began)."""

    def seconds(work: Any, frame: Any) -> float:
        log.append((work.phase, work.stage.split()[0], len(frame.batch.calls), clock.now()))
        return 1.0

    return seconds


@pytest.mark.asyncio
async def test_backward_before_forward() -> None:
    """Whenever a gradient is complete it goes back before any further forward begins."""
    clock, log = VirtualClock(), list[Any]()
    waiting: list[int] = []  # backwards that were ready when a forward was launched

    async def code(net: Any, n: int) -> Any:
        return (await net.stage(torch.full((3,), float(n)))).sum()

    network = Coded(code, stage=Stage(linear(), device=SimulatedDevice(0, seconds=logged(clock, log), clock=clock)))
    async with network:
        floor = network._house()._floor
        assert floor is not None
        (station,) = floor.stations
        launch = station.launch_forward

        def watched(calls: Any) -> None:
            waiting.append(station.lane.waiting)
            launch(calls)

        station.launch_forward = watched  # type: ignore[method-assign]
        await taught(network, range(8), max_active_keys=4)
    assert sum(phase == "backward" for phase, *_ in log) == 8
    assert waiting == [0] * 8
    phases = [phase for phase, *_ in log]
    assert phases != ["forward"] * 8 + ["backward"] * 8  # they do alternate


@pytest.mark.asyncio
async def test_what_gathers_while_the_device_is_busy_runs_as_one() -> None:
    """The first call runs at once; those that come meanwhile make one batch, as far as it may be."""
    clock, log = VirtualClock(), list[Any]()
    stage = Stage(lambda x: x, device=SimulatedDevice(0, seconds=logged(clock, log), clock=clock), max_batch=4)

    async def code(net: Any, n: int) -> Any:
        if n:
            await clock.sleep(0.5)
        return await net.stage(torch.ones(1))

    network = Coded(code, stage=stage)
    assert len([step async for step in network.run(range(7))]) == 7
    assert [(calls, when) for _, _, calls, when in log] == [(1, 0.0), (4, 1.0), (2, 2.0)]


@pytest.mark.asyncio
async def test_max_wait() -> None:
    """A batch that is not full waits for company until its oldest call has waited long enough, or until it is full."""
    clock, log = VirtualClock(), list[Any]()
    device = SimulatedDevice(0, seconds=logged(clock, log), clock=clock)

    async def code(net: Any, when: float) -> Any:
        await clock.sleep(when)
        return await net.stage(torch.ones(1))

    network = Coded(code, stage=Stage(lambda x: x, device=device, max_batch=3, max_wait=2.0))
    arrivals = [0.25, 1.25, 5.0, 5.5, 6.0, 20.0]
    assert len([step async for step in network.run(arrivals)]) == 6
    assert [(calls, when) for _, _, calls, when in log] == [(2, 2.25), (3, 6.0), (1, 22.0)]


@pytest.mark.asyncio
async def test_the_fullest_stage_of_a_shared_device() -> None:
    """Two stages on one device: the fuller inbox goes first."""
    clock, log = VirtualClock(), list[Any]()
    device = SimulatedDevice(0, seconds=logged(clock, log), clock=clock)
    device.shares_stream = True  # as accelerators do

    async def code(net: Any, n: int) -> Any:
        return await (net.many if n < 5 else net.few)(torch.ones(1))

    network = Coded(
        code,
        few=Stage(lambda x: x, device=device, max_batch=8),
        many=Stage(lambda x: x, device=device, max_batch=8),
    )
    assert len([step async for step in network.run(range(7))]) == 7
    assert [(stage, calls) for _, stage, calls, _ in log] == [("many", 5), ("few", 2)]


@pytest.mark.asyncio
async def test_a_rare_shape_gets_its_turn() -> None:
    """However many calls of another shape keep coming, the odd one is served within a few batches."""
    clock, log = VirtualClock(), list[Any]()
    served: list[float] = []

    async def code(net: Any, n: int) -> Any:
        if n == 0:
            await net.stage(torch.ones(7))
            served.append(clock.now())
        else:
            for _ in range(40):
                await net.stage(torch.ones(2))
        return torch.ones(1)

    network = Coded(
        code, stage=Stage(lambda x: x, device=SimulatedDevice(0, seconds=logged(clock, log), clock=clock), max_batch=4)
    )
    assert len([step async for step in network.run(range(13), ordered=False)]) == 13
    assert served[0] < 15
    assert clock.now() > 100


@pytest.mark.asyncio
async def test_a_full_inbox_blocks_and_is_counted(settle: Settle) -> None:
    """Calls beyond the bound wait outside; all are answered in the end."""
    clock, log = VirtualClock(), list[Any]()
    device = SimulatedDevice(0, seconds=logged(clock, log), clock=clock)

    async def code(net: Any, n: int) -> Any:
        return sum(await asyncio.gather(*(net.stage(torch.tensor([float(k)])) for k in range(5))))

    network = Coded(code, stage=Stage(lambda x: x, device=device, max_batch=2, inbox=3))
    async with network:
        assert [step.output.item() async for step in network.run(range(4))] == [10.0] * 4
        (station,) = network.stats().stages
        assert station.waiting_peak == 3
        assert station.blocked == 17
        assert station.calls == 20
        check_empty(network)


@pytest.mark.asyncio
async def test_withdrawn_rows_do_not_stop_a_lane(settle: Settle) -> None:
    """Instances cancelled while their rows wait or run: the batch mates come out, gradients and all."""
    clock = VirtualClock(auto=False)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y

    async def code(net: Any, n: int) -> Any:
        h = await net.stage(torch.full((3,), float(n)))
        return (await net.stage(h)).sum()

    network = Coded(code, stage=Stage(Module(), device=SimulatedDevice(0, seconds=1.0, clock=clock), max_batch=8))
    for moment in range(6):  # waiting, running, between, running, back, back
        async with network:
            run = network.learn(range(6), optimizer=SGD, on_error="skip", unused="ignore")

            async def consume(run: Any = run) -> list[int]:
                return [step.index async for step in run]

            task = asyncio.create_task(consume())
            for _ in range(moment):
                await settle()
                clock.advance(0.5)
            floor = network._house()._floor
            assert floor is not None
            await settle(7 if not moment else 100)
            for entry in sorted(floor.entries, key=lambda each: each.index)[::2]:
                entry.cancelled = True
            clock._auto = True
            clock.touch()
            found = await task
            assert set(found) >= {1, 3, 5}
            check_empty(network)
            clock._auto = False
