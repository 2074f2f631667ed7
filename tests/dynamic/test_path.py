"""The path of an instance: which stage, when, in which batch, made of what; exact on a virtual clock."""

from __future__ import annotations

import asyncio
from pathlib import Path as File
from typing import Any

import pytest
import torch

from aiotime import SimulatedDevice, VirtualClock
from aiotime.dynamic import Path, Stage, Step, Visit
from tests.dynamic.nets import SGD, Coded, linear


async def diamond(net: Any, n: int) -> Any:
    """0: one; 1 and 2: two of it; 3: one of both."""
    h = await net.one(torch.full((3,), float(n)))
    a, b = await asyncio.gather(net.two(h), net.two(h * 2))
    return (await net.one(a + b)).sum()


def network(clock: VirtualClock, max_batch: int = 1) -> Coded:
    return Coded(
        diamond,
        one=Stage(linear(seed=1), device=SimulatedDevice(0, seconds=1.0, clock=clock), max_batch=max_batch),
        two=Stage(linear(seed=2), device=SimulatedDevice(1, seconds=3.0, clock=clock), max_batch=max_batch),
    )


async def one_path(net: Coded, *, learn: bool) -> Path:
    source = [1]
    run = net.learn(source, optimizer=SGD, paths=True) if learn else net.run(source, paths=True)
    (step,) = [step async for step in run]
    assert isinstance(step, Step)
    assert step.path is not None
    assert step.calls == len(step.path.visits) == 4
    return step.path


@pytest.mark.asyncio
async def test_times_parents_and_batches() -> None:
    """Forwards take 1 and 3 s, one after the other on a device; the way back likewise, last call first."""
    path = await one_path(network(VirtualClock()), learn=True)
    numbers = [(v.number, v.stage, v.asked, v.size, v.parents) for v in path.visits]
    assert numbers == [
        (0, "one", 0.0, 1, ()),
        (1, "two", 1.0, 1, (0,)),
        (2, "two", 1.0, 1, (0,)),
        (3, "one", 7.0, 1, (1, 2)),
    ]
    assert [v.ended for v in path.visits] == [1.0, 4.0, 7.0, 8.0]
    backs = [v.back for v in path.visits]
    assert all(back is not None for back in backs)
    assert sorted(back[1] for back in backs if back is not None) == [9.0, 12.0, 15.0, 16.0]
    assert path.stages == ("one", "two")
    assert [v.batch for v in path.visits] == [1, 1, 2, 2]


@pytest.mark.asyncio
async def test_batched_and_predicting() -> None:
    """Two calls of one instance may share a batch; a prediction has no way back and knows no parents."""
    path = await one_path(network(VirtualClock(), 4), learn=False)
    assert [(v.size, v.ended, v.back, v.parents) for v in path.visits] == [
        (1, 1.0, None, ()),
        (2, 4.0, None, ()),
        (2, 4.0, None, ()),
        (1, 5.0, None, ()),
    ]
    assert len({v.batch for v in path.visits[1:3]}) == 1


@pytest.mark.asyncio
@pytest.mark.may_block  # a file is written
async def test_it_prints_and_draws(tmp_path: File) -> None:
    """A line per call; a PNG with something on it."""
    pytest.importorskip("matplotlib")
    path = await one_path(network(VirtualClock(), 4), learn=True)
    lines = str(path).splitlines()
    assert lines[0] == "instance 0"
    assert len([line for line in lines if line.split()[:1] and line.split()[0].isdigit()]) == 4
    target = tmp_path / "path.png"
    path.draw(target, title="a path")
    data = target.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 5000


def test_an_empty_path() -> None:
    """An instance that called nothing."""
    assert "no stage was called" in str(Path(3, ()))
    assert Path(3, ()).stages == ()


def test_visits_are_values() -> None:
    """Frozen, and equal where all is equal."""
    one = Visit(0, "a", 0.0, 1.0, 2.0, 1, 1, ())
    assert one == Visit(0, "a", 0.0, 1.0, 2.0, 1, 1, ())
    with pytest.raises(AttributeError):
        one.size = 2  # type: ignore[misc]
