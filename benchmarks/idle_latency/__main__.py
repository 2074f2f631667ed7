"""python -m benchmarks.idle_latency"""

from __future__ import annotations

import asyncio
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import torch
from torch import nn

import aiotime
from benchmarks._costs import WakeUps, wake_ups
from benchmarks._harness import LOOPS, Loop, Report, parser, percentile, progress, run_on
from benchmarks.idle_latency import __doc__ as question

PAUSE = 0.001  # seconds between two frames: everything has gone to sleep
P50, P99 = 80.0, 500.0  # µs


def tiny() -> nn.Sequential:
    """A model of a few microseconds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()).eval()


async def latencies(model: nn.Sequential, number: int) -> dict[str, list[float]]:
    """Seconds from asking to having, per contender; the contenders take turns frame by frame."""
    frame = torch.rand(1, 16)
    cpus = ["cpu:0", "cpu:1"]
    found: dict[str, list[float]] = {
        "the module itself": [],
        "aiotime, default plan": [],
        "aiotime, 2 CPU streams": [],
        "run_in_executor, one thread": [],
    }
    default = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=cpus)
    streams = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=cpus, balance="even")
    loop = asyncio.get_running_loop()

    def prepare() -> None:
        torch.set_num_threads(1)
        torch.inference_mode().__enter__()

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(default)
        await stack.enter_async_context(streams)
        pool = stack.enter_context(ThreadPoolExecutor(1, initializer=prepare))
        for count in range(-number // 10, number):
            if count % 200 == 0:
                progress(f"frame {count} of {number}")
            spent: dict[str, float] = {}
            await asyncio.sleep(PAUSE)
            start = time.perf_counter()
            with torch.inference_mode():
                model(frame)
            spent["the module itself"] = time.perf_counter() - start
            for name, pipeline in (("aiotime, default plan", default), ("aiotime, 2 CPU streams", streams)):
                await asyncio.sleep(PAUSE)
                start = time.perf_counter()
                await pipeline.submit(frame)
                spent[name] = time.perf_counter() - start
            await asyncio.sleep(PAUSE)
            start = time.perf_counter()
            await loop.run_in_executor(pool, model, frame)
            spent["run_in_executor, one thread"] = time.perf_counter() - start
            if count >= 0:  # the first tenth warms up
                for name, seconds in spent.items():
                    found[name].append(seconds)
    progress("")
    return found


def main() -> None:
    arguments = parser(question or "").parse_args()
    number = 20 if arguments.quick else 100 * (arguments.rounds or 30)
    torch.set_num_threads(1)
    model = tiny()
    report = Report(
        __file__,
        question=question or "",
        setup=f"2 × (linear 16, ReLU), batch 1, CPU streams with 1 intra-op thread; {number:,} frames per contender by "
        f"submit(), one at a time, in turns, each after {PAUSE * 1e3:g} ms of silence. Added: less the median of the "
        "plain call.",
        arguments=arguments,
    )
    costs: dict[Loop, WakeUps] = {}
    for loop in LOOPS:
        measured = run_on(loop, latencies(model, number))
        costs[loop] = wake_ups(loop, min(number, 500), pause=PAUSE)
        plain = percentile(measured["the module itself"], 0.5)
        rows: list[list[str | float]] = []
        for name, seconds in measured.items():
            p50, p90, p99 = ((percentile(seconds, share) - plain) * 1e6 for share in (0.5, 0.9, 0.99))
            rows.append([name, percentile(seconds, 0.5) * 1e6, p50, p90, p99, (max(seconds) - plain) * 1e6])
            if name.startswith("aiotime") and loop == LOOPS[0]:
                report.target(f"{name}, {loop}: added, p50", p50, P50, unit=" µs", at_most=True)
                report.target(f"{name}, {loop}: added, p99", p99, P99, unit=" µs", at_most=True)
        report.table(
            f"One idle frame on {loop} (µs)",
            ["contender", "p50", "added p50", "added p90", "added p99", "added most"],
            rows,
        )
    report.table(
        "What this machine charges after the same silence (µs)",
        ["what", *costs],
        [
            ["loop wakes a thread, p50", *(cost.thread_p50 * 1e6 for cost in costs.values())],
            ["thread wakes the loop, p50", *(cost.loop_p50 * 1e6 for cost in costs.values())],
            ["loop → thread → loop, p50", *(cost.round_trip_p50 * 1e6 for cost in costs.values())],
            ["loop → thread → loop, p99", *(cost.round_trip_p99 * 1e6 for cost in costs.values())],
        ],
    )
    report.finish()


if __name__ == "__main__":
    main()
