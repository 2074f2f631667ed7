"""Bytes between host and GPU: pageable, pinned for each frame, or through aiotime's ring; alone and beside computing.

Written on aiotime's own narrow interface to a runtime, so that it runs on the pretended accelerator too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import torch_backend
from aiotime.devices.pretend import PretendBackend
from aiotime.devices.staging import Ring
from benchmarks.gpu.part import Part

SIZES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)  # bytes of a frame
TOY_SIZES = (1 << 8,)
DEVICE = 0
ROUNDS = 5


class Ways:
    """How a frame of ``nbytes`` gets to the device on ``stream``; each queues one and returns."""

    def __init__(self, backend: Any, stream: Any, nbytes: int) -> None:
        self.backend = backend
        self.stream = stream
        self.nbytes = nbytes
        self.pageable = torch.ones(nbytes, dtype=torch.uint8)
        self.ready = backend.pinned(nbytes)
        self.ring = Ring(Accelerator.of(backend, DEVICE))
        self.kept: Any = None  # the newest copy; the stream's order makes letting go of the one before it safe

    def by_pageable(self) -> None:
        """As it lies: the driver copies it into a buffer of its own first."""
        with self.backend.on(self.stream):
            self.kept = self.backend.send(self.pageable, DEVICE)

    def by_fresh_pin(self) -> None:
        """Into pinned memory taken for this frame."""
        pinned = self.backend.pinned(self.nbytes)
        self.backend.fill(self.backend.carve(pinned, self.pageable), self.pageable)
        with self.backend.on(self.stream):
            self.kept = self.backend.send(pinned, DEVICE)

    def by_ring(self) -> None:
        """Into one of aiotime's slots."""
        slot = self.ring.take()
        pinned = slot.hold(0, self.pageable)
        with self.backend.on(self.stream):
            self.kept = self.backend.send(pinned, DEVICE)
        self.stream.record_event(slot.event)

    def from_pinned(self) -> None:
        """The frame lies in pinned memory already: what the link gives."""
        with self.backend.on(self.stream):
            self.kept = self.backend.send(self.ready, DEVICE)

    def back(self) -> None:
        """A device's array into pinned memory."""
        with self.backend.on(self.stream):
            self.backend.download(self.kept)


def timed(call: Callable[[], None], settle: Callable[[], None], frames: int) -> dict[str, float]:
    """Medians over rounds: the launching thread's seconds per frame, and those until all have arrived."""
    launching, whole = [], []
    for _ in range(ROUNDS):
        settle()
        start = time.perf_counter()
        for _ in range(frames):
            call()
        launched = time.perf_counter()
        settle()
        launching.append((launched - start) / frames)
        whole.append((time.perf_counter() - start) / frames)
    return {"host_us": median(launching) * 1e6, "us": median(whole) * 1e6}


def overlapped(backend: Any, compute: Callable[[Any], None], nbytes: int, frames: int, *, apart: bool) -> float:
    """Seconds a frame: in, compute, out; on one stream, or on three that wait for each other by events."""
    inward = backend.new_stream(DEVICE)
    middle, outward = (backend.new_stream(DEVICE), backend.new_stream(DEVICE)) if apart else (inward, inward)
    source, spent = backend.pinned(nbytes), []
    for _ in range(ROUNDS):
        backend.synchronize(DEVICE)
        held: list[Any] = []  # what other streams read lives until all is done
        start = time.perf_counter()
        for _ in range(frames):
            arrived, computed = backend.new_event(), backend.new_event()
            with backend.on(inward):
                value = backend.send(source, DEVICE)
            if apart:
                inward.record_event(arrived)
                middle.wait_event(arrived)
            with backend.on(middle):
                compute(middle)
            if apart:
                middle.record_event(computed)
                outward.wait_event(computed)
            with backend.on(outward):
                held.append((value, backend.download(value)))
        backend.synchronize(DEVICE)
        spent.append((time.perf_counter() - start) / frames)
    return median(spent)


def between_gpus(nbytes: int, frames: int) -> dict[str, Any]:
    """From the first GPU to the second, on a stream of the first."""
    backend = torch_backend("cuda")
    here, there = backend.new_stream(0), backend.new_stream(1)
    value = backend.blank(nbytes, 0)

    def copy() -> None:
        with backend.on(here, there):
            backend.send(value, 1)

    def settle() -> None:
        backend.synchronize(0)
        backend.synchronize(1)

    direct = torch.cuda.can_device_access_peer(0, 1)
    found = timed(copy, settle, frames)
    return {**found, "gb_per_s": nbytes / found["us"] / 1e3, "peer_access": direct}


def run(part: Part) -> None:
    """Each size."""
    backend: Any = PretendBackend(1) if part.dry else torch_backend("cuda")
    names: dict[str, Callable[[Ways], None]] = {
        "pinned already": Ways.from_pinned,
        "pageable": Ways.by_pageable,
        "pinned for each frame": Ways.by_fresh_pin,
        "aiotime's ring": Ways.by_ring,
        "device to host, pinned": Ways.back,
    }
    for nbytes in TOY_SIZES if part.dry else SIZES:
        size = f"{nbytes >> 10} KiB"
        frames = 3 if part.dry else max(4, min(100, (1 << 28) // nbytes))
        ways = Ways(backend, backend.new_stream(DEVICE), nbytes)
        for name, way in names.items():
            with part.guard("copies", size, name):
                found = timed(partial(way, ways), lambda: backend.synchronize(DEVICE), frames)
                part.put("copies", size, name, value={**found, "gb_per_s": nbytes / found["us"] / 1e3})
        ways.ring.close()
        with part.guard("overlap", size):
            part.put("overlap", size, value=_overlap(part, backend, nbytes, min(frames, 24)))
        part.say(f"copies of {size} are measured")
    with part.guard("between_gpus"):
        if part.dry or torch.cuda.device_count() < 2:
            part.put("between_gpus", value="one GPU")
        else:
            part.put("between_gpus", value=between_gpus(1 << 26, 10))
    if part.dry:
        part.put("violations", value=backend.violations)


def _overlap(part: Part, backend: Any, nbytes: int, frames: int) -> dict[str, float]:
    """Computing that lasts as long as the copy in: three streams can be three times as fast as one."""
    if part.dry:

        def compute(stream: Any) -> None:
            stream.push(lambda: None)
    else:
        runtime = part.runtime()  # nothing of it needs to be closed
        ways = Ways(backend, backend.new_stream(DEVICE), nbytes)
        seconds = timed(ways.from_pinned, lambda: backend.synchronize(DEVICE), frames)["us"] / 1e6

        def compute(stream: Any) -> None:
            runtime.spin(stream, seconds)

    together = overlapped(backend, compute, nbytes, frames, apart=False)
    apart = overlapped(backend, compute, nbytes, frames, apart=True)
    return {"one_stream_us": together * 1e6, "three_streams_us": apart * 1e6, "times": together / apart}
