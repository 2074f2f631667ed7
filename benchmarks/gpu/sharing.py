"""Several stages on one GPU: one stream, a stream each, priorities, or multiprocessors of their own.

Every stage is a CUDA graph (two, for frames in turn), so that launching weighs nothing and only the GPU's sharing is
left. Between stages lie two buffers; a stage waits, on the device, for its input and until its output's buffer is free.

    stage k, frame n:   after stage k-1, frame n     and after stage k+1, frame n-2
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

import torch

from benchmarks._harness import percentile
from benchmarks.gpu.green import Unavailable, by_driver, by_torch
from benchmarks.gpu.nets import CHANNELS, Block
from benchmarks.gpu.part import Part
from benchmarks.gpu.place import CudaPlace, HostPlace, Place

STAGES, LAYERS = 4, 8  # layers of each stage
SIZES = (64, 128, 256, 512)
TOY_SIZES = (8,)
AHEAD = 8  # frames under way
STREAMS = ("one stream", "a stream each", "a stream each, last first", "a stream each, first first")
GREEN = (
    "green context by PyTorch, half of the GPU for all stages",
    "green contexts by the driver, a quarter each",
)


class Chain:
    """``STAGES`` stages of a net on the given streams."""

    def __init__(self, place: Place, streams: list[Any], size: int) -> None:
        torch.manual_seed(0)
        self.place = place
        self.streams = streams
        picture = torch.rand(1, CHANNELS, size, size, device=place.device)
        self.links = [[picture.clone(), picture.clone()] for _ in range(STAGES + 1)]
        self.parts = [
            torch.nn.Sequential(*(Block(CHANNELS, CHANNELS) for _ in range(LAYERS))).to(place.device)
            for _ in range(STAGES)
        ]
        place.synchronize()
        self.calls = [[self._stage(k, turn) for turn in (0, 1)] for k in range(STAGES)]

    def _stage(self, k: int, turn: int) -> Any:
        def call() -> None:
            with torch.no_grad():
                self.links[k + 1][turn].copy_(self.parts[k](self.links[k][turn]))

        return self.place.captured(call, self.streams[k])

    def run(self, seconds: float, *, fewest: int) -> dict[str, Any]:
        """Saturated: frames/s by the host's clock, and each frame's time on the device from its start to its end."""
        place, streams, number = self.place, self.streams, 0
        done: deque[list[Any]] = deque(maxlen=2)  # per frame: the events behind its stages
        flying: deque[tuple[Any, Any]] = deque()
        spans: list[float] = []
        stamps: list[float] = []
        place.synchronize()
        begin = time.perf_counter()
        while len(stamps) < fewest or time.perf_counter() - begin < seconds:
            start, marks = place.event(timing=True), [place.event(timing=k == STAGES - 1) for k in range(STAGES)]
            for k, stream in enumerate(streams):
                if k == 0:
                    stream.record_event(start)
                else:
                    stream.wait_event(marks[k - 1])
                if k + 1 < STAGES and len(done) == 2:
                    stream.wait_event(done[0][k + 1])  # the frame before last has been read out of this buffer
                with place.on(stream):
                    self.calls[k][number % 2]()
                stream.record_event(marks[k])
            done.append(marks)
            flying.append((start, marks[-1]))
            number += 1
            if len(flying) > AHEAD:
                first, last = flying.popleft()
                last.synchronize()
                stamps.append(time.perf_counter())
                spans.append(first.elapsed_time(last))
        place.synchronize()
        spent = stamps[-1] - stamps[0]
        return {
            "per_s": (len(stamps) - 1) / spent if spent > 0 else None,
            "frame_p50_ms": median(spans),
            "frame_p99_ms": percentile(spans, 0.99),
            "frames": len(stamps),
        }


def run(part: Part) -> None:
    """Each size and each way to share."""
    place: Place = HostPlace() if part.dry else CudaPlace()
    sizes = TOY_SIZES if part.dry else SIZES
    todo = len(sizes) * (len(STREAMS) + len(GREEN))
    for names in (STREAMS, GREEN):  # green contexts last: should they break the process, the rest is there
        for size in sizes:
            for name in names:
                with part.guard("ways", f"{size}²", name):
                    seconds = 0.0 if part.dry else max(0.1, min(1.0, 0.6 * part.budget.share(todo)))
                    part.put("ways", f"{size}²", name, value=_way(name, place, size, seconds, dry=part.dry))
                todo -= 1
            part.say(f"{size}²: " + ", ".join(_shown(part.figures["ways"][f"{size}²"])))


def _way(name: str, place: Place, size: int, seconds: float, *, dry: bool) -> dict[str, Any]:
    kept: Any = None
    facts: dict[str, Any] = {}
    if name == "one stream":
        streams = [place.stream()] * STAGES
    elif name == "a stream each":
        streams = [place.stream() for _ in range(STAGES)]
    elif name == "a stream each, last first":  # what is nearest to its end goes first
        streams = [place.stream(priority=-k) for k in range(STAGES)]
    elif name == "a stream each, first first":
        streams = [place.stream(priority=k - STAGES + 1) for k in range(STAGES)]
    elif dry:
        return {"not available": "there are no green contexts on a CPU"}
    else:
        try:
            if "PyTorch" in name:
                half = torch.cuda.get_device_properties(0).multi_processor_count // 2 // 8 * 8
                kept, stream = by_torch(half)
                streams, facts["multiprocessors"] = [stream] * STAGES, half
            else:
                kept, streams, facts["multiprocessors"] = by_driver(STAGES)
        except Unavailable as reason:
            return {"not available": str(reason)}
    found = Chain(place, streams, size).run(seconds, fewest=4 if dry else 20)
    del kept
    return {**found, **facts}


def _shown(ways: dict[str, Any]) -> list[str]:
    return [f"{name} {found['per_s']:.0f}/s" for name, found in ways.items() if found.get("per_s")]
