"""The same frames by three ways in turn: the plain model on one thread, on two, and a pipeline. As ratios.

A machine is never quite at rest, so the ways take turns (A B C, A B C, …) and each round gives its own ratio.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from aiotime.observe.tables import count, rich_table

if TYPE_CHECKING:
    from rich.table import Table

    from aiotime.pipeline import Pipeline

THREADS = (1, 2)  # intra-op threads of the plain model


@dataclass(frozen=True, slots=True)
class Versus:
    """Frames per second of each way in each round; the pipeline is the last way."""

    ways: tuple[str, ...]
    rates: tuple[tuple[float, ...], ...]  # [way][round]

    def median(self, way: int) -> float:
        """Frames per second of one way."""
        return statistics.median(self.rates[way])

    def ratios(self, way: int) -> list[float]:
        """The pipeline's rate over that of another way, round by round."""
        return sorted(ours / theirs for ours, theirs in zip(self.rates[-1], self.rates[way], strict=True))

    @property
    def busy_elsewhere(self) -> bool:
        """True where the model gains nothing from a second thread, as on a machine that has no second core free."""
        return self.median(1) < 1.1 * self.median(0)

    def __rich__(self) -> Table:
        rows = []
        for way, name in enumerate(self.ways):
            ratios = self.ratios(way)
            spread = f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            rows.append([name, count(round(self.median(way))), "" if way == len(self.ways) - 1 else spread])
        return rich_table(("", "frames/s", "pipeline over this"), rows)


async def compare(
    pipeline: Pipeline, model: nn.Module, frames: Sequence[Tensor], *, rounds: int, after: Callable[[int], None]
) -> Versus:
    """Time ``rounds`` rounds of all ways over ``frames``, one way at a time.

    Args:
        pipeline: open, and idle while the plain model runs.
        model: a copy of the model of its own.
        frames: what every way computes.
        rounds: medians are taken over these.
        after: called after each round with the rounds done.
    """
    rates: list[list[float]] = [[] for _ in range(len(THREADS) + 1)]
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="sequential") as thread:  # one thread, so torch keeps its helpers
        for number in range(-1, rounds):  # round -1 warms up
            took = [await loop.run_in_executor(thread, sequential, model, frames, threads) for threads in THREADS]
            took.append(await streamed(pipeline, frames))
            if number < 0:
                continue
            for way, seconds in enumerate(took):
                rates[way].append(len(frames) / seconds)
            after(number + 1)
    ways = [f"the model alone, {threads} thread{'s' * (threads > 1)}" for threads in THREADS]
    stages = pipeline.plan.stages if pipeline.plan is not None else ()
    ways.append("pipeline on " + ", ".join(stage.device for stage in stages))
    return Versus(tuple(ways), tuple(map(tuple, rates)))


def sequential(model: nn.Module, frames: Sequence[Tensor], threads: int) -> float:
    """Seconds for the model to work off ``frames`` one by one with so many intra-op threads."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        model(frames[0])  # wakes the helpers
        start = time.perf_counter()
        for frame in frames:
            model(frame)
        return time.perf_counter() - start


async def streamed(pipeline: Pipeline, frames: Sequence[Tensor]) -> float:
    """Seconds for an open pipeline to work off ``frames``."""
    start = time.perf_counter()
    async with pipeline.run(frames) as run:
        async for _ in run:
            pass
    return time.perf_counter() - start
