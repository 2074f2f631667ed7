"""How a stream scales with its devices: 1 to 64 simulated ones, in virtual time.

The model takes 64 virtual milliseconds; cut over n devices each stage takes 64 / n. The first frame passes through
all of them before the second device has anything to do, so a stream of m frames gains n · m / (m + n - 1). Prints
the speed-up, measured on the virtual clock, beside that formula.
"""

from __future__ import annotations

import aiotime

WORK = 0.064  # virtual seconds of one frame, all layers together
FRAMES = 500


async def measure(devices: int) -> float:
    """Virtual seconds that FRAMES take over ``devices`` equal stages."""
    clock = aiotime.VirtualClock()
    pipeline = aiotime.Pipeline.from_stages(
        [
            aiotime.Stage(
                lambda x: x + 1,
                name=f"stage {index}",
                device=aiotime.SimulatedDevice(index, seconds=WORK / devices, clock=clock),
            )
            for index in range(devices)
        ]
    )
    start = clock.now()
    outputs = [pred.output async for pred in pipeline.run(range(FRAMES))]
    assert outputs == list(range(devices, devices + FRAMES)), "every stage added one, in order"
    return clock.now() - start


async def main() -> float:
    """Measure 1, 2, 4, … 64 devices; the speed-up of 64."""
    alone = await measure(1)
    speed_up = 1.0
    for devices in (1, 2, 4, 8, 16, 32, 64):
        speed_up = alone / await measure(devices)
        expected = devices * FRAMES / (FRAMES + devices - 1)
        print(f"{devices:2} devices: {speed_up:5.2f} ×   (formula {expected:5.2f} ×)")
    return speed_up


if __name__ == "__main__":
    aiotime.run(main())
