"""How busy was the GPU? The union of its kernels' intervals over a window, from the profiler's own trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

Interval = tuple[float, float]  # seconds

COPIES = ("memcpy", "memset")


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same points of time, in order and without overlap."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def covered(intervals: Sequence[Interval], start: float, end: float) -> float:
    """Seconds between ``start`` and ``end`` that at least one interval covers."""
    clipped = [(max(a, start), min(b, end)) for a, b in intervals]
    return sum(b - a for a, b in union(clipped))


def steady(intervals: Sequence[Interval], *, trimmed: float = 0.1) -> Interval:
    """The window from the first kernel to the last without ``trimmed`` of it at either end: filling and draining."""
    if not intervals:
        return 0.0, 0.0
    first, last = min(a for a, _ in intervals), max(b for _, b in intervals)
    cut = (last - first) * trimmed
    return first + cut, last - cut


def idle_share(intervals: Sequence[Interval], *, trimmed: float = 0.1) -> float | None:
    """The share of the steady window without any kernel, 0..1; None where nothing ran."""
    start, end = steady(intervals, trimmed=trimmed)
    if end <= start:
        return None
    return 1.0 - covered(intervals, start, end) / (end - start)


def overlap(intervals: Sequence[Interval]) -> float | None:
    """Kernel seconds over busy seconds: 1 where no two ever run at once; None where nothing ran."""
    busy = sum(b - a for a, b in union(intervals))
    return sum(b - a for a, b in intervals) / busy if busy > 0 else None


class Trace:
    """The profiler around a window. On CUDA its kernels and copies; without a GPU (``dry``) operators of the CPU.

    The profiler sees every thread's kernels, those of a replayed graph too, and costs a microsecond or two a launch.
    """

    def __init__(self, *, dry: bool) -> None:
        activity = torch.profiler.ProfilerActivity
        self._dry = dry
        self._profile = torch.profiler.profile(activities=[activity.CPU if dry else activity.CUDA])

    def __enter__(self) -> Self:
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)  # type: ignore[no-untyped-call]

    def figures(self) -> dict[str, Any]:
        """Idle shares and counts."""
        kernels: list[Interval] = []
        copies: list[Interval] = []
        wanted = "CPU" if self._dry else "CUDA"
        for event in self._profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.device_type().name != wanted:
                continue
            start = event.start_ns() / 1e9
            interval = (start, start + event.duration_ns() / 1e9)
            (copies if event.name().lower().startswith(COPIES) else kernels).append(interval)
        start, end = steady(kernels)
        return {
            "idle": idle_share(kernels),
            "idle_with_copies": idle_share([*kernels, *copies]),
            "kernels_at_once": overlap(kernels),
            "kernels": len(kernels),
            "copies": len(copies),
            "window_s": end - start,
        }
