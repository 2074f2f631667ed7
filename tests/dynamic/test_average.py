"""Replicas: an instance stays with one, their weights become their mean, and what came in between stays."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage
from aiotime.errors import ConfigurationError
from tests.conftest import Settle
from tests.dynamic.nets import SGD, Coded, check_empty, floor_of, linear, taught

NUMBERS: dict[int, int] = {}  # of the copies, by identity


class Numbered(nn.Module):
    """Says which of the copies it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), torch.full(
            (1, len(x)) if x.dim() == 1 else (len(x), 1), float(NUMBERS.setdefault(id(self), len(NUMBERS)))
        )


async def thrice(net: Any, n: int) -> Any:
    h, seen = torch.full((3,), float(n % 5) / 5), set()
    for _ in range(3):
        h, who = await net.stage(h)
        seen.add(who.flatten()[0].item())
    net.seen.append(seen)
    return (h**2).sum()


def replicated(kind: str, count: int, **options: Any) -> Coded:
    clock = VirtualClock()
    devices: list[Any] = [
        f"cpu:{k}" if kind == "cpu" else SimulatedDevice(k, seconds=1.0 + k, clock=clock) for k in range(count)
    ]
    network = Coded(thrice, stage=Stage(Numbered(), device=devices, **{"max_batch": 4, **options}))
    network.seen = []  # type: ignore[attr-defined]
    return network


kinds = pytest.mark.parametrize("kind", ["cpu", "simulated"])


@pytest.mark.asyncio
@kinds
@pytest.mark.parametrize("count", [2, 3])
async def test_replicas(kind: str, count: int) -> None:
    """Every instance sees one copy only, all copies work, and after the end they are the same, to the bit."""
    network = replicated(kind, count, average_every=3)
    async with network:
        await taught(network, range(24), min_update_frequency=6)
        seen: list[set[float]] = vars(network)["seen"]
        assert all(len(each) == 1 for each in seen)
        assert len(set.union(*seen)) == count
        stats = network.stats()
        assert [each.name for each in stats.stages] == [f"stage/{k}" for k in range(count)]
        assert sum(each.gradients for each in stats.stages) == 72
        assert stats.averaged >= 2
        assert "averaged" in str(stats)
        states = [replica.fn.state_dict() for replica in network.stages["stage"].replicas]  # type: ignore[attr-defined]
        for state in states[1:]:
            assert all(torch.equal(value, states[0][key]) for key, value in state.items())
        for key, value in network.state_dict().items():
            assert torch.equal(value, states[0][key.removeprefix("stage.")])
        check_empty(network)


@pytest.mark.asyncio
async def test_updates_in_between_stay(settle: Settle) -> None:
    """A replica that learned between its snapshot and the mean keeps that: θ + (mean - snapshot), exactly."""
    network = replicated("simulated", 2, average_every=10**9)
    async with network:
        await taught(network, range(8), min_update_frequency=3)
        floor = floor_of(network)
        one, two = floor.stations
        assert one.hands is not None and two.hands is not None
        before = [one.hands.weights.snapshot(), two.hands.weights.snapshot()]
        with torch.no_grad():
            for master in one.hands.weights.masters:
                master.add_(1.0)  # they differ now
        (averaging,) = floor.averaging.values()
        act_on, moved = floor.act_on, False

        async def between(actions: Any) -> None:
            nonlocal moved
            await act_on(actions)
            if not moved:  # the snapshots are taken
                moved = True
                assert two.hands is not None
                with torch.no_grad():
                    for master in two.hands.weights.masters:
                        master.sub_(0.5)

        floor.act_on = between  # type: ignore[method-assign]
        version = two.hands.weights.version
        averaging._begin()
        await averaging.ended()
        floor.act_on = act_on  # type: ignore[method-assign]
        for at, (first, second) in enumerate(zip(*before, strict=True)):
            mean = torch.stack([first + 1, second]).mean(0)
            assert torch.equal(one.hands.weights.masters[at], mean)
            assert torch.allclose(two.hands.weights.masters[at], mean - 0.5, atol=1e-6)
        assert two.hands.weights.version == version  # no gradient is late for it
        assert network.stats().averaged >= 1


@pytest.mark.asyncio
async def test_state_dict_is_the_mean_and_loads_into_all() -> None:
    """Copies that share nothing with each other afterwards, buffers included."""
    network = replicated("cpu", 2)
    async with network:
        state = {key: torch.full_like(value, 2.0) for key, value in network.state_dict().items()}
        await network.load_state_dict(state)
        replicas: Any = [replica.fn for replica in network.stages["stage"].replicas]
        assert all((value == 2).all() for value in network.state_dict().values())
        with torch.no_grad():
            replicas[0].layer.weight.fill_(4.0)
            replicas[0].steps.fill_(6.0)
        assert (replicas[1].layer.weight == 2).all()
        assert (replicas[1].steps == 2).all()
        assert (network.state_dict()["stage.layer.weight"] == 3).all()
        assert (network.state_dict()["stage.steps"] == 4).all()


@pytest.mark.asyncio
@kinds
async def test_closing_during_a_round(kind: str) -> None:
    """A round that is under way is finished before the streams go."""
    for turns in range(0, 60, 5):
        network = replicated(kind, 2, average_every=1)
        await network.__aenter__()
        run = network.learn(iter(range(10**6)), optimizer=partial(torch.optim.SGD, lr=1e-3), min_update_frequency=1)
        count = 0
        with pytest.raises(Exception, match="closed"):
            async for _ in run:
                count += 1
                if count == 6:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await network.aclose()


@pytest.mark.asyncio
async def test_a_function_has_no_replicas() -> None:
    """There is nothing to copy or to average."""
    with pytest.raises(ConfigurationError, match="only a module can have replicas"):
        Stage(lambda x: x, replicas=2)


@pytest.mark.asyncio
@pytest.mark.usefixtures("double")
async def test_one_key_per_instance_averages_what_two_would_learn() -> None:
    """Two replicas that are averaged at the end only are the mean of two plain loops over every other instance."""
    source = list(range(8))
    network = replicated("simulated", 2, average_every=10**9, max_batch=1)
    options: dict[str, Any] = {"max_active_keys": 1, "min_update_frequency": 1, "update_per": "instance"}
    halves = []
    for part in (source[::2], source[1::2]):
        alone = replicated("simulated", 1, max_batch=1)
        await taught(alone, part, optimizer=SGD, **options)
        halves.append(alone.state_dict())
    await taught(network, source, optimizer=SGD, **options)
    for key, value in network.state_dict().items():
        assert torch.allclose(value, (halves[0][key] + halves[1][key]) / 2, atol=1e-12)
