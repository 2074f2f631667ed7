"""Opening, closing, leasing: who may use the stages of a network, and in which order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.errors import ClosedError, ConfigurationError
from tests.conftest import Settle
from tests.dynamic.nets import SGD, Coded, check_empty, linear, taught


async def once(net: Any, x: torch.Tensor) -> Any:
    return (await net.stage(x)).sum()


def network(device: Any = "inline", module: Any = None) -> Coded:
    return Coded(once, stage=Stage(module or linear(), device=device))


def is_open(net: Coded) -> bool:
    return not net._house().closed


@pytest.mark.asyncio
async def test_runs_open_and_close_what_nobody_opened() -> None:
    """The last of several runs closes; one opened by hand stays open."""
    net = network()
    one, two = net.run([torch.ones(3)] * 2), net.run([torch.ones(3)] * 2)
    await one.__anext__()
    await two.__anext__()
    await one.aclose()
    assert is_open(net)
    await two.aclose()
    assert not is_open(net)
    async with net:
        assert len([step async for step in net.run([torch.ones(3)])]) == 1
        assert is_open(net)
    assert not is_open(net)


@pytest.mark.asyncio
async def test_a_lesson_that_cannot_begin_leaves_nothing_open(settle: Settle) -> None:
    """The error is the lesson's, and the network is closed again."""
    net = network()
    with pytest.raises(ConfigurationError, match="optimizer"):
        async with net.learn([torch.ones(3)], optimizer=lambda params: 3):  # type: ignore[arg-type, return-value]
            pass
    await settle(until=lambda: net._house().closed)
    assert len(await taught(net, [torch.ones(3)])) == 1
    async with net:  # and where it was opened by hand, the next lesson may begin
        with pytest.raises(ConfigurationError, match="optimizer"):
            await taught(net, [torch.ones(3)], optimizer=lambda params: 3)
        assert len(await taught(net, [torch.ones(3)])) == 1


@pytest.mark.asyncio
async def test_a_run_waits_for_the_closing_of_the_one_before(settle: Settle) -> None:
    """A run that begins while an earlier one still closes does not touch its modules before the last job has ended."""
    clock = VirtualClock(auto=False)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            y: torch.Tensor = self.layer(x)
            return y

    modes: list[bool] = []
    jobs: list[float] = []

    def seconds(work: Any, frame: Any) -> float:
        jobs.append(clock.now())
        return 2.0

    net = network(SimulatedDevice(0, seconds=seconds, clock=clock), Alone())
    first = net.run([torch.ones(3)])
    begun = asyncio.create_task(first.__anext__())
    await settle()
    closing = asyncio.create_task(first.aclose())
    await settle()
    second = asyncio.create_task(taught(net, [torch.ones(3)]))
    await settle()
    assert jobs == [0.0]  # the second waits
    clock.advance(2.0)
    await settle()
    assert jobs == [0.0, 2.0]
    clock._auto = True
    clock.touch()
    await closing
    assert len(await second) == 1
    with pytest.raises(StopAsyncIteration):
        await begun
    assert modes == [False, True]
    assert net.stages["stage"].fn.training  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_closing_twice_and_at_once() -> None:
    """aclose is idempotent; several at once wait for the same end."""
    net = network()
    await net.aclose()
    await net.__aenter__()
    await asyncio.gather(net.aclose(), net.aclose(), net.aclose())
    await net.aclose()
    assert net._house().closed
    with pytest.raises(ClosedError):
        await net.submit(torch.ones(3))


@pytest.mark.asyncio
async def test_clocks_do_not_mix() -> None:
    """Simulated devices share one clock and stand beside no real ones."""
    for other in ("inline", SimulatedDevice(1, seconds=1.0, clock=VirtualClock())):
        net = Coded(
            once,
            stage=Stage(linear(), device=SimulatedDevice(0, seconds=1.0, clock=VirtualClock())),
            other=Stage(linear(), device=other),
        )
        with pytest.raises(ConfigurationError, match="different clocks"):
            await net.__aenter__()


@pytest.mark.asyncio
async def test_devices_are_found() -> None:
    """A stage without a device has a CPU worker of its own, beside those that are taken."""
    net = Coded(
        once,
        stage=Stage(linear()),
        other=Stage(linear(), device="cpu:1"),
        more=Stage(linear()),
        two=Stage(linear(), replicas=2),
    )
    async with net:
        names = [station.device for station in net.stats().stages]
        assert names == ["cpu:0", "cpu:1", "cpu:2", "cpu:3", "cpu:4"]
        await net.submit(torch.ones(3))


@pytest.mark.asyncio
async def test_weights_of_a_closed_network() -> None:
    """state_dict and load_state_dict need no open network; copies share nothing."""
    net = network()
    state = net.state_dict()
    state["stage.weight"].fill_(7.0)
    assert not (net.state_dict()["stage.weight"] == 7).any()
    await net.load_state_dict(state)
    state["stage.weight"].fill_(8.0)
    assert (net.state_dict()["stage.weight"] == 7).all()
    async with net:
        await taught(net, [torch.ones(3)], optimizer=SGD, min_update_frequency=1)
        check_empty(net)
    assert not (net.state_dict()["stage.weight"] == 7).all()
    loaded = network()
    await loaded.load_state_dict(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.asyncio
async def test_loaded_weights_are_learned_from() -> None:
    """After a lesson, loading changes what the optimizer moves, and keeps its state."""
    net = network()
    async with net:
        await taught(net, [torch.ones(3)], min_update_frequency=1)
        await net.load_state_dict({"stage.weight": torch.zeros(3, 3), "stage.bias": torch.zeros(3)})
        await taught(net, [torch.ones(3)], min_update_frequency=1)
        assert torch.allclose(net.state_dict()["stage.weight"], torch.full((3, 3), -0.1))
