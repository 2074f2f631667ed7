"""torch.distributed.pipelining over gloo: a process per stage, tensors over sockets.

rank 0 (this process) ─▶ rank 1 ─▶ … ─▶ the last rank takes the outputs and notes the times
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

from benchmarks.peers.contenders.contender import Contender
from benchmarks.peers.contenders.gpipe import modules
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Work


class Pipelining(Contender):
    """``ScheduleGPipe.eval`` on every rank.

    Args:
        batch: frames of one step, each a micro-batch. 1 is its streaming use: one micro-batch a time, and a rank goes
            on with the next step as soon as its output is sent.
    """

    def __init__(self, *, batch: int = 1) -> None:
        self._batch = batch

    def open(self, work: Work) -> None:
        """Start the other ranks."""
        stages = modules(work)
        shapes = _shapes(stages, work.frames[0])
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = (Path(self._folder.name) / "ranks").as_uri()
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._others = []
        for rank in range(1, len(stages)):
            ours, theirs = context.Pipe()
            arguments = (theirs, stages[rank], shapes[rank : rank + 2], rank, len(stages), self._batch, rendezvous)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self._others.append(process)
        self._rank = Rank(stages[0], shapes[:2], 0, len(stages), self._batch, rendezvous)

    def run(self, feed: Feed, sink: Sink) -> None:
        """Steps on every rank; the last one sends back what it took."""
        for link in self._links:
            link.send((feed.number, sink.keep))
        self._rank.send(feed)
        for link in self._links:
            times, outputs = link.recv()
        sink.times.extend(times)
        sink.outputs.extend(outputs)

    def close(self) -> None:
        """End the other ranks."""
        for link in self._links:
            link.send(None)
        for process in self._others:
            process.join()
        distributed.destroy_process_group()
        self._folder.cleanup()


class Rank:
    """One stage and its schedules: one for whole batches, one for each size of a last, smaller one."""

    def __init__(
        self, module: nn.Module, shapes: list[torch.Tensor], rank: int, ranks: int, batch: int, rendezvous: str
    ) -> None:
        from torch.distributed import pipelining

        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
        self._batch = batch
        inputs, outputs = shapes
        self._schedules = []
        for frames in range(1, batch + 1):
            stage = pipelining.PipelineStage(
                module, rank, ranks, torch.device("cpu"), input_args=(inputs,), output_args=(outputs,)
            )
            self._schedules.append(pipelining.ScheduleGPipe(stage, n_microbatches=frames))

    def send(self, feed: Feed) -> None:
        """What the first rank does: cut the stream into batches; a batch waits for its last frame."""
        frames = iter(feed)
        with torch.inference_mode():
            for size in _sizes(feed.number, self._batch):
                self._schedules[size - 1].eval(torch.cat(list(islice(frames, size))) if size > 1 else next(frames))

    def receive(self, number: int, *, keep: bool) -> Sink:
        """What the others do; only the last one has outputs."""
        sink = Sink(keep=keep)
        with torch.inference_mode():
            for size in _sizes(number, self._batch):
                outputs = self._schedules[size - 1].eval()
                if outputs is not None:
                    for output in outputs.split(1) if size > 1 else (outputs,):
                        sink.take(output)
        return sink


def _sizes(number: int, batch: int) -> Iterator[int]:
    """Full batches and a rest."""
    yield from [batch] * (number // batch)
    if number % batch:
        yield number % batch


def _shapes(stages: list[nn.Module], frame: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each stage and what comes out of the last, for one frame."""
    values = [frame]
    with torch.no_grad():
        for stage in stages:
            values.append(stage(values[-1]))
    return values


def _serve(link: Connection, module: nn.Module, shapes: list[torch.Tensor], *place: Any) -> None:
    rank = Rank(module, shapes, *place)
    while (task := link.recv()) is not None:
        number, keep = task
        sink = rank.receive(number, keep=keep)
        link.send((sink.times, [output.clone() for output in sink.outputs]))
    distributed.destroy_process_group()
