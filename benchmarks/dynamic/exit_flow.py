"""Clients of a network that wait for their answers: each sends its next image once it has the last one's answer.

client 1 ─┐                              ┌─▶ answer, and how long that took
client 2 ─┼─▶ network.run(…) ─ ordered? ─┤
client n ─┘                              └─▶ …
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch

from aiotime.dynamic import Network
from benchmarks._harness import LOOPS, run_on


@dataclass(frozen=True)
class Flow:
    """What the clients saw.

    Attributes:
        latencies: seconds from sending an image to holding its answer.
        answers: the classes, in the order of the images.
        calls: of stages, all images together.
        seconds: from the first image to the last answer.
    """

    latencies: list[float]
    answers: list[int]
    calls: int
    seconds: float


def through(network: Network, images: Sequence[torch.Tensor], *, clients: int, ordered: bool) -> Flow:
    """All images, each once, through a network that is warm."""
    return run_on(LOOPS[0], _through(network, images, clients=clients, ordered=ordered))


async def _through(network: Network, images: Sequence[torch.Tensor], *, clients: int, ordered: bool) -> Flow:
    sent = [0.0] * len(images)
    latencies, answers, calls = [0.0] * len(images), [0] * len(images), 0
    free = asyncio.Semaphore(clients)

    async def sending() -> AsyncIterator[torch.Tensor]:
        for number, image in enumerate(images):
            await free.acquire()
            sent[number] = time.perf_counter()
            yield image

    async with network:
        async for _ in network.run(images[: 2 * clients], max_active_keys=clients):
            pass  # warm
        start = time.perf_counter()
        async for pred in network.run(sending(), max_active_keys=clients, ordered=ordered):
            latencies[pred.index] = time.perf_counter() - sent[pred.index]
            free.release()
            answers[pred.index] = _answer(pred.output)
            calls += pred.calls
        return Flow(latencies, answers, calls, time.perf_counter() - start)


def one_by_one(model: torch.nn.Module, images: Sequence[torch.Tensor], *, blocks: int) -> Flow:
    """Plain PyTorch: the next image when the last is done. ``blocks``: calls of a model that has no exits."""
    latencies, answers, calls = [], [], 0
    with torch.inference_mode():
        for image in images[:2]:
            model(image)  # warm
        start = time.perf_counter()
        for image in images:
            sent = time.perf_counter()
            output = model(image)
            latencies.append(time.perf_counter() - sent)
            answers.append(_answer(output))
            calls += len(output) if output.dim() == 2 else blocks
        return Flow(latencies, answers, calls, time.perf_counter() - start)


def _answer(output: torch.Tensor) -> int:
    """The class that the last exit says."""
    return int(output[-1].argmax()) if output.dim() == 2 else int(output.argmax())
