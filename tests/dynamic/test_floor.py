"""An open network: what it counts, how its jobs settle, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.errors import BusyError, ClosedError, ConfigurationError
from tests.conftest import Settle
from tests.dynamic.nets import ADAM, SGD, Coded, check_empty, floor_of, linear, taught


async def once(net: Any, x: torch.Tensor) -> Any:
    return (await net.stage(x)).sum()


def network(device: Any = "inline") -> Coded:
    return Coded(once, stage=Stage(linear(), device=device))


@pytest.mark.asyncio
async def test_actions_run_between_jobs(settle: Settle) -> None:
    """`act_on` runs on the stream behind what was launched, gradients enabled, and raises the first error."""
    log: list[str] = []
    clock = VirtualClock()
    net = network(SimulatedDevice(0, seconds=1.0, clock=clock))
    async with net:
        floor = floor_of(net)
        (station,) = floor.stations
        request = asyncio.create_task(net.submit(torch.ones(3)))
        await settle(until=lambda: floor.jobs)
        await floor.act_on([(station, lambda: log.append(f"{clock.now()} {torch.is_inference_mode_enabled()}"))])
        assert log == ["1.0 False"]
        await request

        def fail() -> None:
            raise ArithmeticError("an action")

        with pytest.raises(ArithmeticError, match="an action"):
            await floor.act_on([(station, fail)])
        check_empty(net)


@pytest.mark.asyncio
async def test_closing_ends_what_is_in_flight(settle: Settle) -> None:
    """Runs and requests are told that the network was closed; what runs on a device ends first."""
    clock = VirtualClock(auto=False)
    net = network(SimulatedDevice(0, seconds=1.0, clock=clock))
    await net.__aenter__()
    request = asyncio.create_task(net.submit(torch.ones(3)))

    async def consume() -> None:
        async with net.run(iter([torch.ones(3)] * 3)) as run:
            async for _ in run:
                pass

    run = asyncio.create_task(consume())
    await settle(until=lambda: len(floor_of(net).entries) == 4)
    floor = floor_of(net)
    closing = asyncio.create_task(net.aclose())
    await settle()
    assert not closing.done()  # a job runs
    clock._auto = True
    clock.touch()
    await closing
    for task in (request, run):
        with pytest.raises(ClosedError, match="was closed"):
            await task
    assert floor.closed
    assert not floor.entries


@pytest.mark.asyncio
async def test_idle_and_flush_of_nothing() -> None:
    """Return at once."""
    async with network() as net:
        floor = floor_of(net)
        await floor.idle()
        await floor.flush()
        assert not floor.closed


@pytest.mark.asyncio
async def test_who_may_learn() -> None:
    """Nothing to learn, one parameter in two stages, another lesson meanwhile: refused, each with its reason."""
    frozen = Coded(once, stage=Stage(linear().requires_grad_(False), device="inline"))
    with pytest.raises(ConfigurationError, match="learn"):
        await taught(frozen, [torch.ones(3)])
    module = linear()
    tied = Coded(once, stage=Stage(module, device="inline"), other=Stage(torch.nn.Sequential(module), device="inline"))
    with pytest.raises(ConfigurationError, match="parameter"):
        await taught(tied, [torch.ones(3)])
    net = network(SimulatedDevice(0, seconds=1.0, clock=VirtualClock()))
    async with net, net.learn([torch.ones(3)] * 4, optimizer=SGD) as run:
        await run.__anext__()
        with pytest.raises(BusyError, match="other settings"):
            await taught(net, [torch.ones(3)], optimizer=ADAM)


@pytest.mark.asyncio
async def test_a_callback_that_raises_wakes_who_waits(loop_errors: list[dict[str, Any]]) -> None:
    """Even a fault of our own must not leave a closing network waiting for jobs that are over."""
    net = network("cpu:0")
    async with net:
        floor = floor_of(net)
        (station,) = floor.stations

        def wrong(*_: Any) -> None:
            raise AssertionError("wrong")

        floor.act(station, lambda: None, wrong)
        await asyncio.wait_for(floor._no_jobs(), 20)
        assert not floor.jobs
        await net.submit(torch.ones(3))
    assert [str(each["exception"]) for each in loop_errors] == ["wrong"]
    loop_errors.clear()
