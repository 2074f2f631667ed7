"""A run or the requests at the door of a network: credits, outcomes told once, and what comes out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from aiotime import Sample, SimulatedDevice, VirtualClock
from aiotime.dynamic import Stage, Step
from aiotime.dynamic.entry import Entry
from aiotime.dynamic.session import Session
from aiotime.errors import FrameCancelled
from tests.conftest import Settle
from tests.dynamic.nets import Coded, check_empty, floor_of, linear


class Owner:
    """Is told of outcomes."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def settled(self, frame: Any) -> None:
        self.told.append(frame)


async def once(net: Any, x: torch.Tensor) -> Any:
    return (await net.stage(x)).sum()


def network() -> Coded:
    return Coded(once, stage=Stage(linear(), device=SimulatedDevice(0, seconds=1.0, clock=VirtualClock())))


@pytest.mark.asyncio
async def test_an_entry_settles_once(settle: Settle) -> None:
    """Its owner is told once, its credit comes back once, whatever is said later."""
    async with network() as net:
        session = Session(floor_of(net), keys=2, lesson=None, recorded=True)
        owner = Owner()
        entry = session.new_frame(owner, 0, torch.ones(3))
        assert isinstance(entry, Entry)
        assert session.door.take()
        session.enter(entry)
        await settle(until=lambda: owner.told)
        assert owner.told == [entry]
        assert (entry.settled, entry.error, session.door.used) == (True, None, 0)
        session.settle(entry, FrameCancelled("later", frame=0, key=None))
        assert owner.told == [entry]
        assert entry.error is None
        step = session.prediction(entry, 0, 0)
        assert isinstance(step, Step)
        assert (step.calls, step.latency, step.delay) == (1, 1.0, None)
        assert step.path is not None
        assert len(step.path.visits) == 1
        check_empty(net)


@pytest.mark.asyncio
async def test_an_entry_cancelled_at_any_time(settle: Settle) -> None:
    """Before its first line, while it waits, and when it is over."""
    async with network() as net:
        session = Session(floor_of(net), keys=5, lesson=None, recorded=False)
        owner = Owner()
        for turns in range(60):
            told = len(owner.told)
            entry: Any = session.new_frame(owner, turns, torch.ones(3))
            assert session.door.take()
            session.enter(entry)
            for _ in range(turns):
                await asyncio.sleep(0)
            entry.cancelled = True
            assert entry.cancelled
            for _ in range(1000):
                if len(owner.told) > told:
                    break
                await asyncio.sleep(0)
            assert owner.told[told:] == [entry]
            assert entry.error is None or isinstance(entry.error, FrameCancelled)
            assert session.door.used == 0
        await settle(until=lambda: not floor_of(net).jobs)
        check_empty(net)


@pytest.mark.asyncio
async def test_each_run_has_credits_of_its_own() -> None:
    """max_active_keys bounds a run, not the network."""
    peaks = {"a": 0, "b": 0}
    active = {"a": 0, "b": 0}

    async def code(net: Any, who: str) -> Any:
        active[who] += 1
        peaks[who] = max(peaks[who], active[who])
        out = await net.stage(torch.ones(3))
        active[who] -= 1
        return out

    net = network()
    net.code = code
    async with net:

        async def consume(who: str, keys: int) -> None:
            async for step in net.run([who] * 12, max_active_keys=keys, ordered=False):
                assert step.output.shape == (3,)

        await asyncio.gather(consume("a", 2), consume("b", 5))
    assert peaks == {"a": 2, "b": 5}


@pytest.mark.asyncio
async def test_acknowledgements() -> None:
    """Each sample is acknowledged once: with nothing where its step came out, with the error where it failed."""
    acks: dict[int, list[Any]] = {n: [] for n in range(6)}

    async def code(net: Any, n: int) -> Any:
        if n == 2:
            raise LookupError
        return await net.stage(torch.ones(3))

    net = network()
    net.code = code
    source = [Sample(n, ack=acks[n].append) for n in range(6)]
    found = [step.index async for step in net.run(source, on_error="skip")]
    assert found == [0, 1, 3, 4, 5]
    assert {n: [type(each).__name__ for each in told] for n, told in acks.items()} == {
        n: ["StageError" if n == 2 else "NoneType"] for n in range(6)
    }
