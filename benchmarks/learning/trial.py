"""One run: a rule learns a stream in a pipeline; what comes out is a score per member and the curve.

Strict orders give the same bits on any device, so those runs use ``inline`` stages, the fastest for layers of
microseconds. The event order depends on time; its runs use simulated devices on a virtual clock (a forward takes one
virtual second, a backward two), so that they too are the same every time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import aiotime
from aiotime.devices.base import Work
from aiotime.frame import Frame
from benchmarks._harness import LOOPS, run_on
from benchmarks.learning import nets, streams
from benchmarks.learning.rules import BY_NAME, OPTIMIZERS, Row, Setup

BLOCK = 50  # frames per point of a curve
SECONDS = {"forward": 1.0, "backward": 2.0, "relay": 1.0, "weights": 0.0}  # virtual, by phase
SLOWEST = 0.2  # real seconds per frame after which a run counts as stuck


@dataclass(frozen=True, slots=True)
class Trial:
    """What identifies a run; the same trial gives the same outcome.

    Args:
        stream: its name; frames: how many; per_digit: frames per scene, of "digits-smooth".
        rule: its name; stages; optimizer: its name; rate; knob: index into the row's knobs.
        seeds: one member each.
        layers: of the network; law: of its first weights.
    """

    stream: str
    frames: int
    rule: str
    stages: int
    optimizer: str
    rate: float
    knob: int
    seeds: tuple[int, ...]
    per_digit: int = 16
    layers: int = 4
    law: nets.Law = "torch"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave.

    Args:
        scores: per member, over the second half: accuracy, or R².
        curve: mean score of the members in blocks of `BLOCK` frames (R²: the negative mean squared error).
        delay: mean over the second half of the updates that the first stage's weights lacked.
        seconds: real ones; error: why there is nothing else.
    """

    scores: list[float]
    curve: list[float]
    delay: float
    seconds: float
    error: str | None = None


def run(trial: Trial) -> Outcome:
    """Run it; an error of the rule is an outcome, too."""
    start = time.perf_counter()
    try:
        right, targets, delays, task = run_on(LOOPS[0], _learn(trial))
    except Exception as error:  # noqa: BLE001 - a rule that fails is shown as failed
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome([], [], 0.0, time.perf_counter() - start, reason)
    half = len(right) // 2
    blocks = right.mean(1)[: len(right) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
    return Outcome(
        [round(score, 5) for score in task.score(right[half:], targets[half:])],
        [round(value, 4) for value in blocks.nan_to_num(-1.0).tolist()],
        sum(delays[half:]) / len(delays[half:]),
        round(time.perf_counter() - start, 3),
    )


async def _learn(trial: Trial) -> tuple[torch.Tensor, torch.Tensor, list[int], nets.Task]:
    row = BY_NAME[trial.rule]
    stream = streams.make(trial.stream, trial.frames, trial.seeds, per_digit=trial.per_digit)
    pipeline, clock = build(trial, row, stream)
    samples = stream.samples(cuts=row.cuts)
    source: Any = samples
    if clock is not None and row.load is not None and row.load < 1.0:
        source = _paced(samples, clock, (SECONDS["forward"] + SECONDS["backward"]) / row.load)
    outputs, delays = [], []
    async with asyncio.timeout(10 + SLOWEST * len(stream)), pipeline.run(source) as learning:
        async for prediction in learning:
            outputs.append(prediction.output)
            delays.append(prediction.delay[0] if prediction.delay else 0)
    if len(outputs) != len(stream):
        raise RuntimeError(f"{len(stream)} frames went in, {len(outputs)} predictions came out")
    right = stream.task.right(torch.stack(outputs), stream.targets, members=stream.members)
    return right, stream.targets, delays, stream.task


def build(
    trial: Trial, row: Row, stream: streams.Stream, *, devices: Sequence[Any] | None = None
) -> tuple[aiotime.Pipeline, aiotime.VirtualClock | None]:
    """The pipeline of a trial, and its virtual clock where it has one."""
    setup = Setup(
        stream.task,
        trial.seeds,
        trial.stages,
        len(stream),
        OPTIMIZERS[trial.optimizer](trial.rate),
        row.knobs[trial.knob],
    )
    clock = None
    if devices is None and row.load is not None:
        clock = aiotime.VirtualClock()
        devices = [aiotime.SimulatedDevice(k, seconds=_seconds, clock=clock) for k in range(trial.stages)]
    pipeline = aiotime.Pipeline(
        nets.network(stream.task, trial.seeds, layers=trial.layers, law=trial.law),
        example=stream.frames[0],
        devices=devices or ["inline"] * trial.stages,
        balance=[trial.layers // trial.stages] * trial.stages,
        learner=row.make(setup),
    )
    return pipeline, clock


def _seconds(work: Work, frame: Frame) -> float:
    return SECONDS.get(work.phase, 0.0)


async def _paced(
    samples: Sequence[aiotime.Sample], clock: aiotime.VirtualClock, period: float
) -> AsyncIterator[aiotime.Sample]:
    """One sample every ``period`` virtual seconds."""
    start = clock.now()
    for at, sample in enumerate(samples):
        wait = start + at * period - clock.now()
        if wait > 0:
            await clock.sleep(wait)
        yield sample
