"""python -m benchmarks.memory [--frames N] [--tracemalloc]"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import threading
import time
import tracemalloc
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import aiotime
from benchmarks._harness import LOOPS, Report, parser, progress, run_on
from benchmarks.memory import __doc__ as question

MEBIBYTE = 2**20
FLAT = 5.0  # MiB around the value after warm-up
WARM_UP = 0.2  # share of the frames
SAMPLES = 200
FLOATS = 1024  # per frame: 4 KiB, so that keeping 1 frame in 800 would show
Policy = Literal["wait", "latest"]


@dataclass(slots=True)
class Series:
    """What was sampled while the stream ran: frames pulled, resident MiB, tasks, threads, traced KiB."""

    frames: array[float]
    resident: array[float]
    tasks: array[float]
    threads: array[float]
    traced: array[float]
    used: int = 0
    outputs: int = 0
    shed: int = 0
    seconds: float = 0.0

    @classmethod
    def empty(cls) -> Series:
        """Room for all samples, so that keeping them takes no memory while we look at memory."""

        def room() -> array[float]:
            return array("d", bytes(8 * (SAMPLES + 2)))

        return cls(room(), room(), room(), room(), room())

    def sample(self, frame: int) -> None:
        """Look once."""
        at = self.used
        if at >= len(self.frames):
            return
        self.frames[at] = frame
        self.resident[at] = resident_bytes() / MEBIBYTE
        self.tasks[at] = len(asyncio.all_tasks())
        self.threads[at] = threading.active_count()
        self.traced[at] = tracemalloc.get_traced_memory()[0] / 1024 if tracemalloc.is_tracing() else 0.0
        self.used = at + 1

    def after_warm_up(self, values: array[float]) -> list[float]:
        """The samples after the warm-up; the first of them is what the others are compared with."""
        return list(values[int(self.used * WARM_UP) : self.used])


def resident_bytes() -> int:
    """Bytes of this process in memory now (where the system does not say: at most so far)."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


async def stream(policy: Policy, frames: int) -> Series:
    """``frames`` fresh frames through two CPU stages into a consumer that is the slow side."""
    series, every = Series.empty(), max(1, frames // SAMPLES)

    async def source() -> AsyncIterator[torch.Tensor]:
        for index in range(frames):
            if index % every == 0:
                series.sample(index)
                progress(f"{policy}: {index:,} of {frames:,}")
            yield torch.full((FLOATS,), float(index))

    stages = [aiotime.Stage(add_one, name=f"add {k}", device=f"cpu:{k}") for k in range(2)]
    gc.collect()
    start = time.perf_counter()
    async with aiotime.Pipeline.from_stages(stages) as pipeline:
        run = pipeline.run(source(), overflow=policy)
        async for prediction in run:
            expected = prediction.index + 2.0
            if prediction.output[0].item() != expected:
                raise RuntimeError(f"frame {prediction.index} came back as {prediction.output[0].item()}")
            series.outputs += 1
            if series.outputs % 64 == 0:
                await asyncio.sleep(0.001)  # the slow part: a source that is not held back overtakes it
        counters = run.stats()
        series.shed = counters.frames_shed
        series.sample(frames)
    series.seconds = time.perf_counter() - start
    progress("")
    if counters.frames_in != frames or series.outputs + series.shed != frames:
        raise RuntimeError(f"{frames} in, {series.outputs} out and {series.shed} shed do not add up: {counters}")
    return series


def draw(series: dict[Policy, Series], path: Path) -> None:
    """Resident memory against frames."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for policy, one in series.items():
        axes.plot(one.frames[: one.used], one.resident[: one.used], label=f'overflow="{policy}"')
    axes.axvline(WARM_UP * max(one.frames[one.used - 1] for one in series.values()), color="0.7", linestyle=":")
    axes.set(xlabel="frames pulled from the source", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    options = parser(question or "")
    options.add_argument("--frames", type=int, help="in all, half of them with each policy (default: 1,000,000)")
    options.add_argument("--tracemalloc", action="store_true", help="also follow Python's own allocations (slower)")
    arguments = options.parse_args()
    frames = (arguments.frames or (4_000 if arguments.quick else 1_000_000)) // 2
    torch.set_num_threads(1)
    if arguments.tracemalloc:
        tracemalloc.start()
    report = Report(
        __file__,
        question=question or "",
        setup=f"{frames:,} frames of {FLOATS} fresh floats (4 KiB) with each policy through 2 CPU stages with 1 "
        f"intra-op thread each, {LOOPS[0]}; the consumer sleeps after every 64 predictions. Compared with the "
        f"value after the first {WARM_UP:.0%} of the frames.",
        arguments=arguments,
    )
    policies: tuple[Policy, ...] = ("wait", "latest")
    series = {policy: run_on(LOOPS[0], stream(policy, frames)) for policy in policies}
    rows: list[list[str | float]] = []
    for policy, one in series.items():
        resident = one.after_warm_up(one.resident)
        tasks, threads = one.after_warm_up(one.tasks), one.after_warm_up(one.threads)
        drift = max(abs(value - resident[0]) for value in resident)
        rows.append(
            [
                policy,
                one.outputs,
                one.shed,
                one.seconds,
                resident[0],
                min(resident),
                max(resident),
                resident[-1],
                int(max(tasks)),
                int(max(threads)),
            ]
        )
        report.target(f"{policy}: largest change of memory after warm-up", drift, FLAT, unit=" MiB", at_most=True)
        report.target(f"{policy}: tasks more than after warm-up", max(tasks) - tasks[0], 0, at_most=True)
        report.target(f"{policy}: threads more than after warm-up", max(threads) - threads[0], 0, at_most=True)
        if arguments.tracemalloc:
            traced = one.after_warm_up(one.traced)
            report.say("", f"{policy}: Python's own allocations went from {traced[0]:,.0f} to {traced[-1]:,.0f} KiB.")
    report.table(
        "Resident memory (MiB)",
        [
            "overflow",
            "out",
            "shed",
            "seconds",
            "after warm-up",
            "least",
            "most",
            "at the end",
            "most tasks",
            "most threads",
        ],
        rows,
    )
    path = report.figure_path()
    if path is not None:
        try:
            draw(series, path)
        except ImportError:
            report.say("", "matplotlib is not installed: no picture.")
    report.finish()


if __name__ == "__main__":
    main()
