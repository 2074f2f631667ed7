"""The numbers are true: counted beside, and compared."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import torch

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.errors import ClosedError
from tests.dynamic.nets import Coded, floor_of, linear, taught


@pytest.mark.asyncio
async def test_numbers() -> None:
    """Calls, batches, gradients, updates, failures, latencies and busy shares, on a virtual clock."""
    clock = VirtualClock()
    used: Counter[str] = Counter()

    async def code(net: Any, n: int) -> Any:
        h = await net.one(torch.full((3,), float(n)))
        used["one"] += 1
        if n == 4:
            raise LookupError
        for _ in range(n):
            h = await net.two(h)
            used["two"] += 1
        return h.sum()

    network = Coded(
        code,
        one=Stage(linear(), device=SimulatedDevice(0, seconds=1.0, clock=clock), max_batch=4),
        two=Stage(linear(seed=1), device=SimulatedDevice(1, seconds=2.0, clock=clock), max_batch=4),
    )
    with pytest.raises(ClosedError, match="never open"):
        network.stats()
    async with network:
        steps = await taught(network, range(6), on_error="skip", min_update_frequency=5)
        stats = network.stats()
        one, two = stats.stages
        assert (stats.instances_in, stats.instances_out, stats.instances_failed, stats.instances_shed) == (6, 5, 1, 0)
        assert stats.active == 0
        assert stats.elapsed == clock.now()
        assert (one.name, one.device, two.name, two.device) == ("one", "sim:0", "two", "sim:1")
        assert (one.calls, two.calls) == (used["one"], used["two"]) == (6, 11)
        assert sum(size * times for size, times in one.sizes) == 6
        assert one.batch_mean == 6 / one.batches
        assert (one.service_p50, two.service_p99, two.backward_p50) == (1.0, 2.0, 2.0)
        forwards, backwards = one.batches, sum(times for _, times in one.back_sizes)
        assert one.busy == pytest.approx((forwards + backwards) / clock.now())
        assert (one.gradients, two.gradients) == (5, 11)
        assert sum(times for _, times in two.delays) == 11
        assert two.updates in (1, 2)
        assert (one.waiting, one.kept, two.kept, one.failed) == (0, 0, 0, 0)
        latencies = sorted(step.latency for step in steps)
        assert stats.latency_p50 in latencies
        assert stats.latency_p99 == latencies[-1]
        shown = str(stats)
        for word in ("one", "two", "sim:0", "gradients", "delay", "kept"):
            assert word in shown
    assert network.stats().instances_out == 5  # once closed: the last one


@pytest.mark.asyncio
async def test_while_it_works() -> None:
    """What waits and what is kept for a backward is counted now."""
    clock = VirtualClock(auto=False)

    async def code(net: Any, n: int) -> Any:
        return (await net.one(torch.zeros(3))).sum()

    network = Coded(code, one=Stage(linear(), device=SimulatedDevice(0, seconds=1.0, clock=clock)))
    async with network:
        run = network.learn(range(3), optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
        async with run:
            task = asyncio.create_task(run.__anext__())
            for _ in range(200):
                await asyncio.sleep(0)
                if network.stats().active == 3 and floor_of(network).jobs == 2:
                    break
            stats = network.stats()
            assert stats.active == 3
            assert stats.stages[0].waiting == 1  # two are on the device
            clock._auto = True
            clock.touch()
            await task
            kept = network.stats().stages[0].kept
            assert 0 <= kept <= 3
            async for _ in run:
                pass
        assert network.stats().stages[0].kept == 0
