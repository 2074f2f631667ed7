"""torchgpipe (kakaobrain): GPipe in one process.

It pipelines the micro-batches of one batch and waits at its end; so frames are gathered into batches of up to eight,
one frame a micro-batch. On CPUs all its partitions share one worker thread (torchgpipe.worker.spawn_workers), so
it gets both cores as intra-op threads instead.
"""

from __future__ import annotations

import importlib
import queue
import threading
from typing import Any, Self

import torch
from torch import nn

from benchmarks.peers.contenders.contender import CannotError, Contender
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

BATCH = 8  # frames, each a micro-batch


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._part = part

    def forward(self, value: Any) -> Any:
        """What the function makes of it."""
        return self._part(value)


def modules(work: Work) -> list[nn.Module]:
    """The stages as modules; raises where they exchange anything but tensors."""
    if not isinstance(work.frames[0], torch.Tensor):
        raise CannotError("its stages exchange tensors only; these frames are bytes, these outputs lists")
    return [part if isinstance(part, nn.Module) else Call(part) for part in work.stages]


class Batches:
    """Frames gathered on a thread: up to ``most`` of those that are there, at least one."""

    def __init__(self, feed: Feed, most: int) -> None:
        self._feed, self._most = feed, most
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(4 * most)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._gather, name="gather")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _gather(self) -> None:
        for frame in self._feed:
            self._room.acquire()
            self._ready.put(frame)

    def next(self) -> list[Any]:
        """The next batch."""
        frames = [self._ready.get()]
        while len(frames) < self._most:
            try:
                frames.append(self._ready.get_nowait())
            except queue.Empty:
                break
        self._room.release(len(frames))
        return frames


class Gpipe(Contender):
    """Batches of up to eight frames through ``GPipe(model, balance, chunks=8)``."""

    def open(self, work: Work) -> None:
        """Wrap the stages."""
        library: Any = importlib.import_module("torchgpipe")
        stages = modules(work)
        self._model = library.GPipe(
            nn.Sequential(*stages),
            balance=[1] * len(stages),
            devices=["cpu"] * len(stages),
            chunks=BATCH,
            checkpoint="never",
        ).eval()

    def run(self, feed: Feed, sink: Sink) -> None:
        """Batch by batch; its workers are threads of one call."""
        taken = 0
        with Batches(feed, BATCH) as batches, torch.no_grad():
            while taken < feed.number:
                frames = batches.next()
                outputs = self._model(torch.cat(frames))
                for output in outputs.split(1):
                    sink.take(output)
                taken += len(frames)

    def close(self) -> None:
        """Nothing is open."""
