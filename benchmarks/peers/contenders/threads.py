"""Threads and queues by hand: a thread per stage, nothing else."""

from __future__ import annotations

import queue
import threading
from typing import Any

from benchmarks.peers.contenders.contender import Contender, stage_thread
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

ROOM = 64  # frames that a bounded queue holds
Queue = Any  # queue.Queue or queue.SimpleQueue


class Failed:
    """Travels instead of an output."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Threads(Contender):
    """feeding thread ▸ queue ▸ stage thread ▸ queue ▸ … ▸ the main thread takes the outputs.

    Args:
        bounded: ``queue.Queue(64)`` between the stages, so that memory is bounded; otherwise ``queue.SimpleQueue``,
            which is written in C and knows no bound.
    """

    def __init__(self, *, bounded: bool = False) -> None:
        self._bounded = bounded

    def open(self, work: Work) -> None:
        """Queues and threads."""
        self._queues: list[Queue] = [
            queue.Queue(ROOM) if self._bounded else queue.SimpleQueue() for _ in range(len(work.stages) + 1)
        ]
        self._threads = [
            threading.Thread(target=_stage, args=(part, self._queues[index], self._queues[index + 1]))
            for index, part in enumerate(work.stages)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, feed: Feed, sink: Sink) -> None:
        """One thread feeds, this one takes."""
        feeder = threading.Thread(target=_feed, args=(feed, self._queues[0]))
        feeder.start()
        get, take = self._queues[-1].get, sink.take
        for _ in range(feed.number):
            output = get()
            if type(output) is Failed:
                raise output.error
            take(output)
        feeder.join()

    def close(self) -> None:
        """End the threads."""
        self._queues[0].put(None)
        for thread in self._threads:
            thread.join()


def _feed(feed: Feed, inbox: Queue) -> None:
    put = inbox.put
    for frame in feed:
        put(frame)


def _stage(part: Part, inbox: Queue, outbox: Queue) -> None:
    stage_thread()
    get, put = inbox.get, outbox.put
    try:
        while (value := get()) is not None:
            put(value if type(value) is Failed else part(value))
    except Exception as error:  # noqa: BLE001 - raised where the outputs are taken
        put(Failed(error))
    put(None)
