"""A source three times as fast as the pipeline: what each overflow policy does, and what a deadline does.

The device is simulated, 0.1 s for each frame on a virtual clock: ten virtual seconds pass in a moment, and every
number is the same on every machine. Prints, per policy, how many of 300 frames were answered and how old the oldest
answer was; then how many of 20 simultaneous requests were answered within their deadline.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import aiotime
from aiotime.errors import DeadlineExceeded


async def camera(clock: aiotime.VirtualClock) -> AsyncIterator[int]:
    """300 frames, 30 a second, whether or not anybody has time for them."""
    loop = asyncio.get_running_loop()
    for number in range(300):
        due = loop.create_future()
        clock.call_at(number / 30, functools.partial(due.set_result, None))
        await due
        yield number


def build() -> tuple[aiotime.Pipeline, aiotime.VirtualClock]:
    """One stage that takes 0.1 virtual seconds, and its clock."""
    clock = aiotime.VirtualClock()
    device = aiotime.SimulatedDevice(0, seconds=0.1, clock=clock)
    stage = aiotime.Stage(lambda number: number, device=device, name="model")
    return aiotime.Pipeline.from_stages([stage], depth=2), clock


async def stream(**options: Any) -> tuple[int, int]:
    """Run the camera through it; how many frames were answered and how many shed."""
    pipeline, clock = build()
    answered, shed, oldest = 0, 0, 0.0
    async with pipeline.run(camera(clock), **options) as run:
        async for pred in run:
            answered += 1
            shed += pred.dropped_before  # frames of this run that were given up since the prediction before
            oldest = max(oldest, pred.latency)
        total = run.stats()
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    print(f"{shown:<39}answered {answered:3}, shed {total.frames_shed:3}, oldest answer {oldest:.2f} s")
    assert answered + total.frames_shed == 300, "a frame is answered or counted as shed"
    assert shed <= total.frames_shed, "each prediction says what is missing before it"
    return answered, total.frames_shed


async def burst() -> int:
    """20 requests at once, each good for 0.55 s; how many were answered."""
    pipeline, _ = build()
    async with pipeline:
        requests = (pipeline.submit(number, deadline=0.55) for number in range(20))
        answers = await asyncio.gather(*requests, return_exceptions=True)
    late = sum(isinstance(answer, DeadlineExceeded) for answer in answers)
    print(f"requests answered in time: {len(answers) - late} of {len(answers)}")
    return len(answers) - late


async def main() -> tuple[int, int]:
    """All policies, then the burst; answered with "latest" and answered in time."""
    await stream(overflow="wait")  # the camera is slowed down, nothing is lost
    await stream(overflow="drop_newest")  # the first come are served
    await stream(overflow="drop_oldest")  # newer frames matter more
    latest, _ = await stream(overflow="latest")  # one frame waits at the door, the newest
    await stream(overflow="drop_newest", deadline=0.2)  # one that cannot begin in time is not computed at all
    return latest, await burst()


if __name__ == "__main__":
    aiotime.run(main())
