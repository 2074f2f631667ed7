"""A stage on its device: what it keeps and for how long, and whom it blames."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.errors import StageError
from tests.conftest import Settle
from tests.dynamic.nets import Coded, check_empty, floor_of, linear, taught


async def chain(net: Any, n: int) -> Any:
    h = await net.low(torch.full((3,), float(n)))
    return (await net.high(h)).sum()


def network(clock: VirtualClock, low: Any = None, **options: Any) -> Coded:
    return Coded(
        chain,
        low=Stage(low or linear(seed=1), device=SimulatedDevice(0, seconds=1.0, clock=clock), **options),
        high=Stage(linear(seed=2), device=SimulatedDevice(1, seconds=1.0, clock=clock), **options),
    )


@pytest.mark.asyncio
async def test_graphs_are_kept_until_their_backward(settle: Settle) -> None:
    """One per forward, from its end to the end of its backward."""
    clock = VirtualClock(auto=False)
    net = network(clock)
    async with net:
        task = asyncio.create_task(taught(net, [1], min_update_frequency=1))
        await settle(until=lambda: len(floor_of(net).entries) == 1)
        await settle()
        kept = []
        for _ in range(4):
            kept.append(tuple(len(station.kept) for station in floor_of(net).stations))
            clock.advance(1.0)
            await settle()
        kept.append(tuple(len(station.kept) for station in floor_of(net).stations))
        assert kept == [(0, 0), (1, 0), (1, 1), (1, 0), (0, 0)]
        await task
        check_empty(net)


@pytest.mark.asyncio
async def test_weights_of_old_versions_are_freed() -> None:
    """A version lives as long as a graph that was made with it, no longer."""
    versions: list[weakref.ref[torch.Tensor]] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not versions or versions[-1]() is not self.weight:
                versions.append(weakref.ref(self.weight))
            return super().forward(x)

    net = network(VirtualClock(), Watched(3, 3))
    async with net:
        await taught(net, range(20), max_active_keys=6, min_update_frequency=1)
        gc.collect()
        assert len(versions) > 5
        assert sum(ref() is not None for ref in versions) <= 1


@pytest.mark.asyncio
async def test_errors_name_stage_and_instance() -> None:
    """Of a batch that fails, every instance is told of itself."""

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("always")

    net = network(VirtualClock(), fail, max_batch=4)
    errors: list[Any] = []
    async with net:
        run = net.run(range(4), on_error=lambda frame, error: errors.append(error))
        assert [step async for step in run] == []
        assert [error.frame for error in errors] == [0, 1, 2, 3]
        assert all(type(error) is StageError and error.stage == "low" for error in errors)
        check_empty(net)
