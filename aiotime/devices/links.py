"""How long bytes take between two memories: measured once per pair and process, then two numbers.

    seconds(nbytes) = latency + nbytes x per byte

Not yet run on a GPU.
"""

from __future__ import annotations

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import HOST

SMALL, LARGE = 1 << 16, 1 << 24  # bytes
COPIES = 8  # in a row, as a stream of frames would


def link(accelerator: Accelerator, other: int) -> tuple[float, float]:
    """(seconds, seconds per byte) between ``accelerator`` and device ``other`` or HOST, in the slower direction.

    Blocks: not for use on a running loop.
    """
    found = accelerator.links.get(other)
    if found is None:
        found = line((SMALL, _measure(accelerator, other, SMALL)), (LARGE, _measure(accelerator, other, LARGE)))
        accelerator.links[other] = found
    return found


def line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Latency and slope through two measurements (bytes, seconds); noise never makes either negative."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max(0.0, small[1] - slope * small[0]), slope


def _measure(accelerator: Accelerator, other: int, nbytes: int) -> float:
    backend, index = accelerator.backend, accelerator.index
    start, end = backend.new_event(timing=True), backend.new_event(timing=True)
    slowest = 0.0
    with accelerator.lent("measure") as stream, backend.on(stream):
        here, there = backend.blank(nbytes, index), backend.blank(nbytes, other)
        backend.current(index).synchronize()
        if other != HOST:
            backend.current(other).synchronize()
        for outward in (True, False):
            for timed in (False, True):
                if timed:
                    stream.record_event(start)
                for _ in range(COPIES):
                    if not outward:
                        backend.send(there, index)
                    elif other == HOST:
                        backend.download(here)
                    else:
                        backend.send(here, other)
                if timed:
                    stream.record_event(end)
                stream.synchronize()
            slowest = max(slowest, start.elapsed_time(end) / 1000 / COPIES)
    return slowest
