"""python -m benchmarks.simulated_scaling"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiotime
from benchmarks._harness import LOOPS, Report, parser, progress, run_on
from benchmarks.simulated_scaling import __doc__ as question

TARGETS = {8: 7.9, 64: 63.0}  # devices: times one device
TOLERANCE = 0.01  # of 1 / slowest


@dataclass(frozen=True, slots=True)
class Outcome:
    """Virtual seconds, but for ``real``."""

    total: float  # from the first frame's entering to the last one's result
    steady: float  # per frame, once every stage is at work
    real: float  # seconds spent simulating


async def simulate(seconds: Sequence[float], frames: int, *, depth: int | None = None) -> Outcome:
    """``frames`` frames through one simulated device per stage."""
    clock = aiotime.VirtualClock()
    stages = [
        aiotime.Stage(lambda x: x + 1, name=f"stage {k}", device=aiotime.SimulatedDevice(k, seconds=each, clock=clock))
        for k, each in enumerate(seconds)
    ]
    start, before = time.perf_counter(), clock.now()
    arrivals: list[float] = []
    async with aiotime.Pipeline.from_stages(stages, depth=depth) as pipeline:
        async for prediction in pipeline.run(range(frames)):
            if prediction.output != prediction.index + len(seconds):
                raise RuntimeError(f"frame {prediction.index} came back as {prediction.output}")
            arrivals.append(clock.now())
    if len(arrivals) != frames:
        raise RuntimeError(f"{frames} frames went in, {len(arrivals)} came out")
    half = frames // 2
    steady = (arrivals[-1] - arrivals[half]) / (frames - 1 - half)
    return Outcome(arrivals[-1] - before, steady, time.perf_counter() - start)


def main() -> None:
    arguments = parser(question or "").parse_args()
    quick = arguments.quick
    counts = (1, 2, 8) if quick else (1, 2, 4, 8, 16, 32, 64)
    report = Report(
        __file__,
        question=question or "",
        setup=f"Simulated devices on one virtual clock, one stage each; adaptive depth, {LOOPS[0]}. Exact: no rounds, "
        "no noise. One device would take devices × frames virtual seconds for the same work.",
        arguments=arguments,
    )
    rows: list[list[str | float]] = []
    for count in counts:
        frames = 12 * count if quick else max(1_000, 100 * count)
        progress(f"{count} devices, {frames} frames")
        outcome = run_on(LOOPS[0], simulate([1.0] * count, frames))
        hops = count * frames
        whole = hops / outcome.total
        steady = count / outcome.steady
        rows.append([str(count), frames, outcome.total, whole, steady, outcome.real, outcome.real / hops * 1e6])
        if count in TARGETS:
            report.target(f"{count} devices: times one device, whole stream", whole, TARGETS[count], unit=" ×")
    report.table(
        "Equal stages of one virtual second",
        ["devices", "frames", "virtual s", "speed-up, whole stream", "speed-up, steady", "real s", "real µs per hop"],
        rows,
    )
    rows = []
    worst = 0.0
    chance = random.Random(0)
    for count in (2, 3) if quick else (2, 4, 8, 16, 32):
        seconds = [chance.uniform(0.1, 1.0) for _ in range(count)]
        progress(f"{count} unequal devices")
        outcome = run_on(LOOPS[0], simulate(seconds, 60 if quick else 600))
        ideal = max(seconds)
        error = abs(outcome.steady / ideal - 1)
        worst = max(worst, error)
        rows.append([str(count), ideal, 1 / ideal, 1 / outcome.steady, error * 100])
    progress("")
    report.table(
        "Unequal stages (0.1 to 1 virtual second, drawn with seed 0)",
        ["devices", "slowest s", "1 / slowest", "frames per virtual s", "difference %"],
        rows,
    )
    report.target("unequal stages: difference from 1 / slowest", worst * 100, TOLERANCE * 100, unit=" %", at_most=True)
    report.finish()


if __name__ == "__main__":
    main()
