"""python -m benchmarks.deep_conv"""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncIterator

import torch
from torch import nn

import aiotime
from benchmarks._harness import LOOPS, Contender, Report, Rounds, parser, run_on, take_turns
from benchmarks.deep_conv import __doc__ as question

CHANNELS = 32
OVER_ONE_THREAD = 1.9  # times
OVER_TWO_THREADS = 1.1


def deep(layers: int) -> nn.Sequential:
    """``layers`` times a 5×5 convolution and a ReLU; the size of the picture stays."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(layer for _ in range(layers) for layer in (nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2), nn.ReLU()))
    ).eval()


def sequential(model: nn.Module, frame: torch.Tensor, number: int, *, threads: int) -> float:
    """Frames per second of calls one after the other, with PyTorch's own intra-op threads."""
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            model(frame)
            start = time.perf_counter()
            for _ in range(number):
                model(frame)
            return number / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(1)


async def endless(frame: torch.Tensor) -> AsyncIterator[torch.Tensor]:
    """A stream that never stops."""
    while True:
        yield frame


async def pipelined(pipeline: aiotime.Pipeline, frame: torch.Tensor, number: int) -> float:
    """Frames per second of a stream that goes on: neither filling nor draining is in the time."""
    async with pipeline, pipeline.run(endless(frame)) as run:
        for _ in range(3):
            await anext(run)
        start = time.perf_counter()
        for _ in range(number):
            await anext(run)
        return number / (time.perf_counter() - start)


def measure(size: int, number: int, *, layers: int, rounds: int) -> tuple[Rounds, aiotime.Pipeline]:
    """One thread, two threads and two stages, in turns."""
    model, frame = deep(layers), torch.rand(1, CHANNELS, size, size)
    pipeline = aiotime.Pipeline(copy.deepcopy(model), example=frame, devices=["cpu:0", "cpu:1"], balance="even")
    contenders: dict[str, Contender] = {
        "one thread": lambda: sequential(model, frame, number, threads=1),
        "PyTorch's two threads": lambda: sequential(model, frame, number, threads=2),
        "aiotime, two stages": lambda: run_on(LOOPS[0], pipelined(pipeline, frame, number)),
    }
    return take_turns(contenders, rounds=rounds), pipeline


def main() -> None:
    arguments = parser(question or "").parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 7)
    layers = 4 if arguments.quick else 30
    numbers = {16: 3, 24: 3} if arguments.quick else {64: 24, 128: 8}  # size of the picture: frames per round
    torch.set_num_threads(1)
    report = Report(
        __file__,
        question=question or "",
        setup=f"{layers} × (conv 5×5 with {CHANNELS} channels, ReLU), batch 1, float32; {rounds} rounds in turns, "
        f"medians. aiotime: 2 CPU streams with 1 intra-op thread each, layers divided evenly, on {LOOPS[0]}, "
        "measured while the stream goes on.",
        arguments=arguments,
    )
    for size, number in numbers.items():
        measured, _ = measure(size, number, layers=layers, rounds=rounds)
        report.table(
            f"{size}×{size}, {number} frames a round",
            ["contender", "frames/s", "ms per frame", "× one thread", "× two threads"],
            [
                [
                    name,
                    measured.median(name),
                    1e3 / measured.median(name),
                    measured.ratio(name, "one thread"),
                    measured.ratio(name, "PyTorch's two threads"),
                ]
                for name in measured.figures
            ],
        )
        over_one = measured.ratio("aiotime, two stages", "one thread")
        over_two = measured.ratio("aiotime, two stages", "PyTorch's two threads")
        report.target(f"{size}×{size}: times one thread", over_one, OVER_ONE_THREAD, unit=" ×")
        report.target(f"{size}×{size}: times PyTorch's two threads", over_two, OVER_TWO_THREADS, unit=" ×")
    report.finish()


if __name__ == "__main__":
    main()
