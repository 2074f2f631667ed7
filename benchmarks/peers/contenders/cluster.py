"""Ray, in an environment of its own: an actor per stage, called one by one or as a compiled graph."""

from __future__ import annotations

import importlib
import os
import queue
import threading
from collections import deque
from typing import Any

import torch

from benchmarks.peers.contenders.contender import Contender
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Work

AHEAD = 16  # frames in flight; more made neither faster


class StageActor:
    """One stage, in a process of its own."""

    def __init__(self, part: Any) -> None:
        torch.set_num_threads(1)
        self._part = part

    def work(self, value: Any) -> Any:
        """One frame."""
        with torch.inference_mode():
            return self._part(value)


class Actors(Contender):
    """Chained calls of actors: results stay in Ray's object store until the last stage has made the output."""

    def open(self, work: Work) -> None:
        """Start Ray and an actor per stage, all on this machine."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.ray: Any = importlib.import_module("ray")
        stages = len(work.stages)
        self.ray.init(
            num_cpus=stages + 1, include_dashboard=False, log_to_driver=False, configure_logging=False,
            object_store_memory=256 * 2**20,
        )  # fmt: skip
        remote = self.ray.remote(num_cpus=1)(StageActor)
        self.actors = [remote.remote(part) for part in work.stages]

    def run(self, feed: Feed, sink: Sink) -> None:
        """A feeding thread sends frames off, at most `AHEAD` at a time; this one waits for them in order."""
        coming: queue.SimpleQueue[Any] = queue.SimpleQueue()
        room = threading.Semaphore(AHEAD)

        def send() -> None:
            for frame in feed:
                room.acquire()
                value: Any = frame
                for actor in self.actors:
                    value = actor.work.remote(value)
                coming.put(value)

        feeder = threading.Thread(target=send, name="feeder")
        feeder.start()
        for _ in range(feed.number):
            sink.take(self.ray.get(coming.get()))
            room.release()
        feeder.join()

    def close(self) -> None:
        """End everything that Ray has started."""
        self.ray.shutdown()


class Graph(Actors):
    """The same actors as a compiled graph: fixed channels of shared memory, no scheduling per call."""

    def open(self, work: Work) -> None:
        """Bind and compile."""
        super().open(work)
        dag: Any = importlib.import_module("ray.dag")
        with dag.InputNode() as given:
            node: Any = given
            for actor in self.actors:
                node = actor.work.bind(node)
        self._graph = node.experimental_compile(_max_inflight_executions=AHEAD)

    def run(self, feed: Feed, sink: Sink) -> None:
        """Not thread-safe: one thread sends and takes; it takes first what is in flight beyond `AHEAD` frames."""
        flying: deque[Any] = deque()
        for frame in feed:
            if len(flying) == AHEAD:
                sink.take(self.ray.get(flying.popleft()))
            flying.append(self._graph.execute(frame))
        while flying:
            sink.take(self.ray.get(flying.popleft()))

    def close(self) -> None:
        """Take the graph down, then Ray."""
        self._graph.teardown()
        super().close()
