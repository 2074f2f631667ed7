"""Wake-up: from the GPU's completion to the task that goes on, and what waiting costs the CPU.

    host    launch ─ arm ─ asked ··················· resumed
    device           ├── stage ──┤ completion ── signal

latency = resumed - max(completion, asked): a way is not blamed for a stage that was over before it was asked.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks._harness import LOOPS, percentile, run_on
from benchmarks.gpu.moment import Clocks, brackets, offset
from benchmarks.gpu.part import Part
from benchmarks.gpu.runtime import Runtime
from benchmarks.gpu.waits import WAYS, Way

DURATIONS = (10e-6, 30e-6, 100e-6, 300e-6, 1e-3, 3e-3, 10e-3)  # seconds of a stage
TOY_DURATIONS = (100e-6, 3e-3)
MOST, FEWEST = 400, 40  # frames
WARM = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame, in seconds on the host's clock."""

    asked: float
    resumed: float
    completion: float

    @property
    def latency(self) -> float:
        """From what came last, completion or question, to the task that goes on."""
        return self.resumed - max(self.completion, self.asked)

    @property
    def late(self) -> bool:
        """It was over before it was asked for."""
        return self.completion <= self.asked


def frames_for(stage: float, seconds: float) -> int:
    """How many frames of ``stage`` seconds fit into ``seconds``, launching and waking up included."""
    return int(max(FEWEST, min(MOST, seconds / (stage + 150e-6))))


def figures(samples: list[Sample], clocks: Clocks, cpu: float, wall: float) -> dict[str, Any]:
    """One cell of the table, in microseconds."""
    latencies = [sample.latency for sample in samples]
    return {
        "p50_us": percentile(latencies, 0.5) * 1e6,
        "p99_us": percentile(latencies, 0.99) * 1e6,
        "largest_us": max(latencies) * 1e6,
        "uncertainty_us": clocks.uncertainty * 1e6,
        "over_before_asked": sum(sample.late for sample in samples) / len(samples),
        "cpu_us_per_frame": cpu / len(samples) * 1e6,
        "wall_us_per_frame": wall / len(samples) * 1e6,
        "cores": cpu / wall,
        "drift_ppm": clocks.drift * 1e6,
        "frames": len(samples),
    }


async def cell(runtime: Runtime, way: Way, stage: float, frames: int) -> dict[str, Any]:
    """``frames`` stages of ``stage`` seconds, one after the other, awaited by ``way``."""
    stream, now = way.stream, time.perf_counter
    reference = runtime.event(timing=True)
    ends = [runtime.event(timing=True) for _ in range(frames)]
    for event in ends:  # the driver makes an event at its first record
        stream.record_event(event)
    stream.record_event(reference)
    stream.synchronize()
    way.open()
    try:
        for number in range(1, WARM + 1):
            runtime.spin(stream, stage)
            way.arm(number)
            await way.wait(number)
        stream.synchronize()
        before = offset(brackets(runtime, stream, reference))
        asked, resumed = [], []
        cpu, wall = time.process_time(), now()
        for number, end in enumerate(ends, WARM + 1):
            runtime.spin(stream, stage)
            stream.record_event(end)
            way.arm(number)
            asked.append(now())
            await way.wait(number)
            resumed.append(now())
        cpu, wall = time.process_time() - cpu, now() - wall
        stream.synchronize()
        clocks = Clocks(before, offset(brackets(runtime, stream, reference)))
    finally:
        await way.close()
    completions = [clocks.host(runtime.elapsed(reference, end)) for end in ends]
    samples = [Sample(a, r, c) for a, r, c in zip(asked, resumed, completions, strict=True)]
    return figures(samples, clocks, cpu, wall)


def launch_cost(runtime: Runtime, frames: int) -> float:
    """CPU seconds per frame of launching alone; the waits' own cost is what goes beyond."""
    stream, event = runtime.stream(), runtime.event()
    runtime.synchronize()
    cpu = time.process_time()
    for _ in range(frames):
        runtime.spin(stream, 1e-6)
        stream.record_event(event)
    spent = time.process_time() - cpu
    runtime.synchronize()
    return spent / frames


def run(part: Part) -> None:
    """Every way at every duration on both loops."""
    runtime = part.runtime()
    try:
        _run(part, runtime)
    finally:
        runtime.close()


def _run(part: Part, runtime: Runtime) -> None:
    durations = TOY_DURATIONS if part.dry else DURATIONS
    stream = runtime.stream()
    part.put("launch_cpu_us", value=median(launch_cost(runtime, 200) for _ in range(5)) * 1e6)
    part.put("host_launcher", value=getattr(runtime, "host_launcher", ""))
    if hasattr(runtime, "cycles_per_second"):
        part.put("cycles_per_second", value=runtime.cycles_per_second)
    todo = len(durations) * len(LOOPS) * len(WAYS)
    for stage in durations:
        for loop in LOOPS:
            for kind in WAYS:
                frames = 6 if part.dry else frames_for(stage, 0.9 * part.budget.share(todo))
                key = f"{stage * 1e6:g}"
                todo -= 1
                if part.budget.left < stage * (frames + WARM) + 0.05:
                    part.put("cells", loop, kind.name, key, value={"skipped": "no time left"})
                    continue
                with part.guard("cells", loop, kind.name, key):
                    way = kind(runtime, stream, frames + WARM)
                    found = run_on(loop, asyncio.wait_for(cell(runtime, way, stage, frames), 20.0))
                    part.put("cells", loop, kind.name, key, value=found)
            part.say(f"wake-up, {stage * 1e6:g} µs stages on {loop}: {_line(part, loop, stage)}")


def _line(part: Part, loop: str, stage: float) -> str:
    key = f"{stage * 1e6:g}"
    found = {
        name: cells[key]["p50_us"]
        for name, cells in part.figures.get("cells", {}).get(loop, {}).items()
        if cells.get(key, {}).get("p50_us") is not None
    }
    return ", ".join(f"{name} {value:.0f}" for name, value in found.items()) + " µs"
