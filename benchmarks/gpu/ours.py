"""aiotime in the contest: the net cut evenly over 1, 2, 4 stages on one GPU, each on streams of its own.

``devices=["cuda:0"] * 4`` names the same GPU four times; every stage gets a launcher thread with its own three streams.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import warnings
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

import aiotime
from aiotime.frame import Prediction
from aiotime.learning import Delayed, Exact
from benchmarks.gpu.busy import Trace
from benchmarks.gpu.drive import Run
from benchmarks.gpu.nets import RATE, Task, frames, net, targets
from benchmarks.gpu.place import Place


@dataclass(frozen=True, slots=True)
class Windows:
    """What is measured of each contender, in seconds.

    Attributes:
        warm: before anything counts.
        saturated: as fast as frames are taken.
        traced: of that, under the profiler.
        paced: at `rate`.
        rate: frames per second that arrive; None: this part is left out.
        fewest: frames in each window.
    """

    warm: float
    saturated: float
    traced: float
    paced: float
    rate: float | None
    fewest: int


class Ours:
    """A pipeline of the contest's net.

    Args:
        task: of the contest.
        place: where.
        stages: on the devices of the place, in turn.
        compiled: for ``compile=``; None: it is not handed in.
        exact: learn by `Exact` instead of `Delayed`.
    """

    def __init__(
        self, task: Task, place: Place, *, stages: int, compiled: str | None = None, exact: bool = False
    ) -> None:
        self.task = task
        self.place = place
        self.pictures, self.targets = frames(task, place), targets(task, place)
        options: dict[str, Any] = {} if compiled is None else {"compile": compiled}
        if task.learns:
            rule = Exact if exact else Delayed
            options["learner"] = rule(loss=functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=RATE))
        devices = [place.devices[k % len(place.devices)] for k in range(stages)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.pipeline = aiotime.Pipeline(
                net(task.layers), example=self.pictures[0], devices=devices, balance="even", **options
            )
        self.said = [str(warning.message) for warning in said]
        if compiled is not None and self.said and place.device.type == "cuda":
            raise RuntimeError(f"it would not run compiled as asked: {'; '.join(self.said)}")
        assert self.pipeline.plan is not None, "it was made of a model"
        self.resolved = [stage.device for stage in self.pipeline.plan.stages]

    def frame(self, number: int) -> Any:
        """What the stream gives: a picture, or a picture with its target."""
        which = number % len(self.pictures)
        return aiotime.Sample(self.pictures[which], self.targets[which]) if self.task.learns else self.pictures[which]

    async def stream(self) -> AsyncIterator[Any]:
        """Frames without end."""
        for number in itertools.count():
            yield self.frame(number)

    async def race(self, windows: Windows, trace: Callable[[], Trace] | None) -> dict[str, Any]:
        """Every window, in one opening of the pipeline; ``answer`` is the output of frame 0."""
        found: dict[str, Any] = {"devices": self.resolved, "warnings": self.said}
        async with self.pipeline:
            async with self.pipeline.run(self.stream()) as run:
                found["answer"] = (await anext(run)).output.clone()
                await self._for(run, windows.warm, 2)
                self.place.synchronize()
                found["saturated"] = (await self._for(run, windows.saturated, windows.fewest)).figures()
                if trace is not None:
                    profiler = trace()
                    with profiler:
                        traced = await self._for(run, windows.traced, windows.fewest)
                    found["traced_per_s"] = traced.rate
                    found["trace"] = profiler.figures()
            if windows.rate is not None:
                found["paced"] = (await self._paced(windows.rate, windows.paced, windows.fewest)).figures()
            found["stats"] = str(self.pipeline.stats())
        return found

    async def _for(self, stream: AsyncIterator[Prediction], seconds: float, fewest: int) -> Run:
        await anext(stream)
        run = Run(time.perf_counter())
        while len(run.stamps) < fewest or run.stamps[-1] - run.start < seconds:
            prediction = await anext(stream)
            run.stamps.append(time.perf_counter())
            run.latencies.append(prediction.latency)
        run.end = run.stamps[-1]
        return run

    async def _paced(self, rate: float, seconds: float, fewest: int) -> Run:
        """Latency counts from the moment at which a frame is handed in: the loop's timers are a millisecond coarse."""
        count = max(fewest, int(rate * seconds))
        run = Run(time.perf_counter())

        async def one(number: int) -> None:
            handed = time.perf_counter()
            await self.pipeline.submit(self.frame(number))
            now = time.perf_counter()
            run.stamps.append(now)
            run.latencies.append(now - handed)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, run.start + number / rate - time.perf_counter()))
                group.create_task(one(number), name=f"paced:{number}")
        run.end = time.perf_counter()
        return run
