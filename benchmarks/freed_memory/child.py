"""One process under one setting of malloc: python -m benchmarks.freed_memory.child SETTING SIZE NUMBER LAYERS

Prints JSON: per contender frames per second and page faults per frame; the peak of the process in MiB.
"""

from __future__ import annotations

import copy
import ctypes
import json
import resource
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

import aiotime
from aiotime import heap
from benchmarks._harness import LOOPS, run_on
from benchmarks.deep_conv.__main__ import CHANNELS, deep, endless

CONTENDERS = ("main thread", "worker thread", "PyTorch's two threads", "aiotime, two stages")
M_ARENA_MAX = -8
PARTS = {
    "trim": (heap.M_TRIM_THRESHOLD, heap.NEVER),
    "mmap": (heap.M_MMAP_THRESHOLD, heap.MMAP_THRESHOLDS[0]),
    "pad": (heap.M_TOP_PAD, heap.PAD),
    "arena": (M_ARENA_MAX, 1),
}


def tell_malloc(setting: str) -> None:
    """``plain``, ``kept``, or parts of it joined by +."""
    if setting == "kept":
        aiotime.keep_freed_memory()
    elif setting != "plain":
        libc = ctypes.CDLL(None)
        for part in setting.split("+"):
            libc.mallopt(*PARTS[part])


class Meter:
    """Frames per second and page faults per frame, between start and stop."""

    def start(self) -> None:
        """From here."""
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._time = time.perf_counter()

    def stop(self, number: int) -> dict[str, float]:
        """To here, ``number`` frames later."""
        spent = time.perf_counter() - self._time
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults
        return {"rate": number / spent, "faults": faults / number}


def sequential(model: nn.Module, frame: torch.Tensor, number: int, *, threads: int) -> dict[str, float]:
    """Calls one after the other on the thread that calls this."""
    torch.set_num_threads(threads)
    meter = Meter()
    with torch.inference_mode():
        for _ in range(2):
            model(frame)
        meter.start()
        for _ in range(number):
            model(frame)
    found = meter.stop(number)
    torch.set_num_threads(1)
    return found


def on_a_thread(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The same, on a thread of its own, which allocates from another heap than the main one."""
    found: dict[str, float] = {}
    thread = threading.Thread(target=lambda: found.update(measure()), name="worker")
    thread.start()
    thread.join()
    return found


async def pipelined(pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int) -> dict[str, float]:
    """A stream that goes on: neither filling nor draining is measured."""
    meter = Meter()
    async with pipeline, pipeline.run(endless(frame)) as run:
        for _ in range(4):
            await anext(run)
        meter.start()
        for _ in range(number):
            await anext(run)
        return meter.stop(number)


def main() -> None:
    setting, size, number, layers = sys.argv[1], *map(int, sys.argv[2:])
    tell_malloc(setting)
    torch.set_num_threads(1)
    model, frame = deep(layers), torch.rand(1, CHANNELS, size, size)
    main_thread, worker, two, stages = CONTENDERS
    found: dict[str, dict[str, float] | float] = {
        main_thread: sequential(model, frame, number, threads=1),
        worker: on_a_thread(lambda: sequential(model, frame, number, threads=1)),
        two: sequential(model, frame, number, threads=2),
    }
    pipeline = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=["cpu:0", "cpu:1"], balance="even")
    found[stages] = run_on(LOOPS[0], pipelined(pipeline, frame, number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["peak"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
