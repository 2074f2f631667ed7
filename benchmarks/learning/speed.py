"""Speed: forward, backward and Adam of a deep convolutional stream, over two CPU stages and over simulated devices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import aiotime
from aiotime.devices.base import Work
from aiotime.frame import Frame
from aiotime.learning.delayed import Delayed
from benchmarks._harness import LOOPS, Contender, Report, run_on, take_turns
from benchmarks.deep_conv.__main__ import CHANNELS, deep, endless

OVER_ONE_THREAD = 1.8  # times
OVER_TWO_THREADS = 1.1
OVER_LOCKSTEP = 1.0  # equal stages; "no slower"
VIRTUAL = {8: 7.8}  # devices: times one device
ORDERS = ("event", "1f1b", "lockstep")
FORWARD, BACKWARD = 1.0, 2.0  # virtual seconds of a stage

Adam = partial(torch.optim.Adam, lr=1e-5)


def small(output: torch.Tensor) -> torch.Tensor:
    """A loss without target."""
    return output.square().mean()


def plain(model: nn.Module, frame: torch.Tensor, number: int, *, threads: int) -> float:
    """Frames per second of the loop that everybody writes."""
    optimizer = Adam(model.parameters())
    torch.set_num_threads(threads)
    try:
        for turn in range(number + 1):
            if turn == 1:  # the first makes the optimizer's state
                start = time.perf_counter()
            optimizer.zero_grad()
            small(model(frame)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return number / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(1)


async def _learned(pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int) -> float:
    """Frames per second of a stream that goes on; the order bounds what is predicted but not yet learned from."""
    async with pipeline, pipeline.run(endless(frame)) as run:
        for _ in range(4):
            await anext(run)
        start = time.perf_counter()
        for _ in range(number):
            await anext(run)
        return number / (time.perf_counter() - start)


def pipelines(model: nn.Sequential, frame: torch.Tensor, balance: Sequence[int]) -> dict[str, aiotime.Pipeline]:
    """One per order, over two CPU streams with one intra-op thread each."""
    return {
        order: aiotime.Pipeline(
            model,
            example=frame,
            devices=["cpu:0", "cpu:1"],
            balance=[2 * layers for layers in balance],  # a convolution and its ReLU
            learner=Delayed(order=order, loss=small, optimizer=Adam),  # type: ignore[arg-type]
        )
        for order in ORDERS
    }


def real(report: Report, *, layers: int, side: int, number: int, rounds: int) -> None:
    """Two CPU stages against the plain loop on one thread and on two."""
    frame = torch.rand(1, CHANNELS, side, side)
    model = deep(layers).train()
    even = [layers // 2, layers - layers // 2]
    uneven = [2 * layers // 3, layers - 2 * layers // 3]
    contenders: dict[str, Contender] = {
        "plain loop, one thread": partial(plain, deep(layers).train(), frame, number, threads=1),
        "plain loop, two threads": partial(plain, deep(layers).train(), frame, number, threads=2),
    }
    for balance in (even, uneven):
        for order, pipeline in pipelines(model, frame, balance).items():
            contenders[_name(order, balance)] = partial(_on_loop, pipeline, frame, number)
    measured = take_turns(contenders, rounds=rounds)
    one, two = list(contenders)[:2]
    report.table(
        f"{layers} × (conv 5×5 with {CHANNELS} channels, ReLU) at {side}×{side}, batch 1: forward, backward, Adam; "
        f"{number} frames a round",
        ["contender", "frames/s", "ms per frame", "× one thread", "× two threads"],
        [
            [
                name,
                measured.median(name),
                1e3 / measured.median(name),
                measured.ratio(name, one),
                measured.ratio(name, two),
            ]
            for name in contenders
        ],
    )
    ours = _name("event", even)
    report.target("two stages, event: times one thread", measured.ratio(ours, one), OVER_ONE_THREAD, unit=" ×")
    report.target("two stages, event: times two threads", measured.ratio(ours, two), OVER_TWO_THREADS, unit=" ×")
    for words, balance in (("equal", even), ("unequal", uneven)):
        ratio = measured.ratio(_name("event", balance), _name("lockstep", balance))
        report.target(f"{words} stages: event times lockstep", ratio, OVER_LOCKSTEP, unit=" ×")


def _name(order: str, balance: Sequence[int]) -> str:
    return f"aiotime, {order}, {' / '.join(map(str, balance))}"


def _on_loop(pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int) -> float:
    return run_on(LOOPS[0], _learned(pipeline, frame, number))


# ---------------------------------------------------------------------- simulated


async def _virtual(speeds: Sequence[float], order: str, frames: int) -> float:
    """Virtual seconds until ``frames`` frames have been predicted and learned from."""
    clock = aiotime.VirtualClock()

    def seconds(work: Work, frame: Frame) -> float:
        return (BACKWARD if work.phase == "backward" else FORWARD) * speeds[work.index]

    model = nn.Sequential(*(nn.Linear(2, 2) for _ in speeds))
    pipeline = aiotime.Pipeline(
        model,
        example=torch.zeros(1, 2),
        devices=[aiotime.SimulatedDevice(k, seconds=seconds, clock=clock) for k in range(len(speeds))],
        balance=[1] * len(speeds),
        learner=Delayed(order=order, loss=small, optimizer=partial(torch.optim.SGD, lr=0.0), idle=None),  # type: ignore[arg-type]
    )
    source: list[Any] = list(torch.zeros(frames, 1, 2))
    async with pipeline:
        async for _ in pipeline.run(source):
            pass
        await asyncio.wait_for(pipeline.drain(), 60)
        return clock.now()


def simulated(report: Report, *, devices: Sequence[int], frames: int) -> None:
    """The schedules alone: a forward takes one virtual second per stage, a backward two; nothing else takes time."""
    rows: list[list[str | float]] = []
    cases = [(f"{number} equal", [1.0] * number) for number in devices]
    cases += [("1, 2, 1, 1", [1.0, 2.0, 1.0, 1.0]), ("2 / 1", [2.0, 1.0]), ("1, 1, 1, 1.5", [1.0, 1.0, 1.0, 1.5])]
    for name, speeds in cases:
        alone = frames * sum(speeds) * (FORWARD + BACKWARD)  # one device does everything
        spent = {order: run_on(LOOPS[0], _virtual(speeds, order, frames)) for order in ORDERS}
        rows.append([name, sum(speeds) / max(speeds), *(alone / spent[order] for order in ORDERS)])
        if len(speeds) in VIRTUAL and name.endswith("equal"):
            report.target(
                f"{name} simulated stages: times one device, event", alone / spent["event"], VIRTUAL[len(speeds)],
                unit=" ×",
            )  # fmt: skip
    report.table(
        f"Simulated devices: times one device, {frames:,} frames predicted and learned from, with filling and draining",
        ["stages", "at most", *ORDERS],
        rows,
    )
