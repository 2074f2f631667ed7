"""SPDL (facebookresearch/spdl): a pipeline of stages on executors, made for loading data."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from benchmarks.peers.contenders.contender import Contender, stage_thread
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Work

AHEAD = 16  # calls of a stage under way; its thread still runs one at a time
ROOM = 64  # outputs that the sink holds


class Spdl(Contender):
    """One `pipe` per stage with a thread of its own, outputs in the order of the inputs, no statistics kept."""

    def open(self, work: Work) -> None:
        """Threads outlive a run; a pipeline is built for each source, as SPDL means it."""
        self._builder: Any = importlib.import_module("spdl.pipeline").PipelineBuilder
        self._work = work
        self._pools = [ThreadPoolExecutor(1, initializer=stage_thread) for _ in work.stages]

    def run(self, feed: Feed, sink: Sink) -> None:
        """Build, start, take, stop."""
        builder = self._builder().add_source(feed.__iter__())
        # partial, as an nn.Sequential has items and would be taken for a container
        for index, (part, pool) in enumerate(zip(self._work.stages, self._pools, strict=True)):
            builder.pipe(partial(part), executor=pool, concurrency=AHEAD, output_order="input", name=f"stage {index}")
        builder.add_sink(ROOM)
        pipeline = builder.build(
            num_threads=1, max_failures=0, use_thread_output_queue=True, task_hook_factory=lambda _: []
        )
        with pipeline.auto_stop():
            for output in pipeline.get_iterator(timeout=30):
                sink.take(output)

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools:
            pool.shutdown()
