"""python -m benchmarks.idle_latency"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import torch
from torch import nn

import aiotime
from benchmarks._costs import WakeUps, wake_ups
from benchmarks._harness import LOOPS, Report, parser, percentile, progress, run_on
from benchmarks.idle_latency import __doc__ as question

SILENCE = 0.001  # seconds between two frames after which everything has gone to sleep
BLOCK = 25  # frames in a row by one contender
P50, P99 = 80.0, 500.0  # µs
DIRECT = "the module itself"
Ask = Callable[[torch.Tensor], Awaitable[object]]


def tiny() -> nn.Sequential:
    """A model of a few microseconds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()).eval()


def prepare_thread() -> None:
    """What the executor's thread does once: the same conditions as a CPU stream's."""
    torch.set_num_threads(1)
    torch.inference_mode().__enter__()


async def latencies(model: nn.Sequential, number: int, *, pause: float) -> dict[str, list[float]]:
    """Seconds from asking to having, ``number`` per contender; the contenders take turns, a block of frames each."""
    frame, cpus, loop = torch.rand(1, 16), ["cpu:0", "cpu:1"], asyncio.get_running_loop()

    async def directly(frame: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(frame)
        return result

    async with AsyncExitStack() as stack:
        default = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=cpus)
        streams = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=cpus, balance="even")
        await stack.enter_async_context(default)
        await stack.enter_async_context(streams)
        pool = stack.enter_context(ThreadPoolExecutor(1, initializer=prepare_thread))
        contenders: dict[str, Ask] = {
            DIRECT: directly,
            "aiotime, default plan": default.submit,
            "aiotime, 2 CPU streams": streams.submit,
            "run_in_executor, one thread": lambda frame: loop.run_in_executor(pool, model, frame),
        }
        found: dict[str, list[float]] = {name: [] for name in contenders}
        blocks = max(1, number // BLOCK)
        for block in range(-max(1, blocks // 10), blocks):  # the first tenth warms up
            progress(f"block {block} of {blocks}")
            for name, ask in contenders.items():
                for _ in range(BLOCK):
                    await asyncio.sleep(pause)
                    start = time.perf_counter()
                    await ask(frame)
                    spent = time.perf_counter() - start
                    if block >= 0:
                        found[name].append(spent)
    progress("")
    return found


def main() -> None:
    arguments = parser(question or "").parse_args()
    number = BLOCK if arguments.quick else 100 * (arguments.rounds or 30)
    torch.set_num_threads(1)
    model = tiny()
    report = Report(
        __file__,
        question=question or "",
        setup=f"2 × (linear 16, ReLU), batch 1, CPU streams with 1 intra-op thread; {number:,} frames per contender by "
        f"submit(), one at a time, in turns of {BLOCK}. After silence: {SILENCE * 1e3:g} ms before each frame. Added: "
        "less the median of the plain call under the same silence.",
        arguments=arguments,
    )
    costs: dict[str, WakeUps] = {}
    for loop in LOOPS:
        for kind, pause in (("after silence", SILENCE), ("back to back", 0.0)):
            measured = run_on(loop, latencies(model, number, pause=pause))
            costs[f"{kind}, {loop}"] = wake_ups(loop, min(number, 500), pause=pause)
            plain = percentile(measured[DIRECT], 0.5)
            rows: list[list[str | float]] = []
            for name, seconds in measured.items():
                p50, p90, p99 = ((percentile(seconds, share) - plain) * 1e6 for share in (0.5, 0.9, 0.99))
                rows.append([name, percentile(seconds, 0.5) * 1e6, p50, p90, p99, (max(seconds) - plain) * 1e6])
                if name.startswith("aiotime") and loop == LOOPS[0]:
                    report.target(f"{name}, {kind}: added, p50", p50, P50, unit=" µs", at_most=True)
                    report.target(f"{name}, {kind}: added, p99", p99, P99, unit=" µs", at_most=True)
            report.table(
                f"One frame {kind} on {loop} (µs)",
                ["contender", "p50", "added p50", "added p90", "added p99", "added most"],
                rows,
            )
    report.table(
        "What this machine charges (µs)",
        ["where", "loop wakes a thread", "thread wakes the loop", "loop → thread → loop, p50", "p99"],
        [
            [where, *(1e6 * x for x in (cost.thread_p50, cost.loop_p50, cost.round_trip_p50, cost.round_trip_p99))]
            for where, cost in costs.items()
        ],
    )
    report.finish()


if __name__ == "__main__":
    main()
