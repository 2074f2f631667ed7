"""Who works on which frame when: a trace of the pipeline as text, as a picture, and for ui.perfetto.dev.

Three stages on simulated devices take 1, 2 and 1 ms, so the picture is the same on every machine: the digits are
frames, the second stage is always busy and the others wait for it half of the time. With real devices the same two
lines record a trace. Writes trace.json and timeline.png into the current folder (the picture needs the extra [plot])
and prints the timeline and the share of the time the slowest stage was busy.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiotime
from aiotime.observe.timeline import plot_timeline, render_timeline

STAGES = {"decode": 0.001, "model": 0.002, "draw": 0.001}  # seconds


async def main(folder: Path = Path()) -> float:
    """Trace 30 frames; the busy share of the slowest stage."""
    clock = aiotime.VirtualClock()
    stages = [
        aiotime.Stage(lambda x: x, name=name, device=aiotime.SimulatedDevice(index, seconds=seconds, clock=clock))
        for index, (name, seconds) in enumerate(STAGES.items())
    ]
    pipeline = aiotime.Pipeline.from_stages(stages)

    async with pipeline:
        with pipeline.tracing() as trace:
            async for _ in pipeline.run(range(30)):
                pass
        stats = pipeline.stats()

    print(render_timeline(trace, tick=0.001))
    for path in (
        await asyncio.to_thread(trace.save, folder / "trace.json"),  # files and pictures take time: not on the loop
        folder / "timeline.png",
    ):
        print(f"wrote {path}")
    await asyncio.to_thread(plot_timeline, trace, folder / "timeline.png", title="stages of 1, 2 and 1 ms")
    busy = max(stage.busy for stage in stats.stages)
    print(f"bottleneck: {stats.bottleneck}, busy {busy:.0%}")
    return busy


if __name__ == "__main__":
    aiotime.run(main())
