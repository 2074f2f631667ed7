"""PARTIME's scheme, restated for CPU threads (PARTIME itself needs CUDA).

    tick 0   stage 0: frame 0
    tick 1   stage 0: frame 1   stage 1: frame 0
    tick 2   stage 0: frame 2   stage 1: frame 1   …

Every stage computes one tick side by side on its thread; when all have ended, everything moves on by one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.peers.contenders.contender import Contender, stage_thread
from benchmarks.peers.stream import Feed, Sink
from benchmarks.peers.works.work import Part, Work

EMPTY: Any = object()  # what a stage is given where no frame has reached it
Tick = Callable[[Any], Any]


class LockStep(Contender):
    """The main thread hands each stage its value and then waits for all of them."""

    def open(self, work: Work) -> None:
        """A thread per stage."""
        self._work = work
        self._lessons: list[Lesson] = []
        if work.kind == "learning":
            self._lessons = [Lesson(part, work, last=part is work.stages[-1]) for part in work.stages]
        ticks: list[Tick] = self._lessons or [_inference(part) for part in work.stages]  # type: ignore[assignment]
        self._inboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in ticks]
        self._outboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in ticks]
        self._threads = [
            threading.Thread(target=_worker, args=(tick, inbox, outbox, work.kind == "learning"))
            for tick, inbox, outbox in zip(ticks, self._inboxes, self._outboxes, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, feed: Feed, sink: Sink) -> None:
        """Tick by tick; a tick begins when the next frame is there."""
        puts = [inbox.put for inbox in self._inboxes]
        gets = [outbox.get for outbox in self._outboxes]
        stages = len(puts)
        values: list[Any] = [EMPTY] * stages  # what each stage computes on in the next tick
        frames = iter(feed)
        taken = 0
        while taken < feed.number:
            values[0] = next(frames, EMPTY)
            for put, value in zip(puts, values, strict=True):
                put(value)
            made = [get() for get in gets]  # the barrier
            for one in made:
                if isinstance(one, BaseException):
                    raise one
            if made[-1] is not EMPTY:
                sink.take(made[-1])
                taken += 1
            values[1:] = made[:-1]
            for lesson, above in zip(self._lessons, self._lessons[1:], strict=False):
                lesson.gradient = above.sent

    def close(self) -> None:
        """End the threads."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()

    def parameters(self) -> dict[str, torch.Tensor]:
        """Stages are parts of the model."""
        return dict(self._work.model.state_dict())


def _inference(part: Part) -> Tick:
    def tick(value: Any) -> Any:
        return EMPTY if value is EMPTY else part(value)

    return tick


class Lesson:
    """A stage that learns: in each tick forward, backward and update, with the gradient that came in the tick before.

    That gradient is of an older frame; it goes through the newest graph (Sideways, Malinowski et al. 2020), which is
    what PARTIME does.
    """

    def __init__(self, part: Part, work: Work, *, last: bool) -> None:
        assert isinstance(part, nn.Module) and work.optimizer is not None and work.loss is not None
        self._part = part
        self._optimizer = work.optimizer(part.parameters())
        self._loss = work.loss if last else None
        self.gradient: torch.Tensor | None = None  # from above
        self.sent: torch.Tensor | None = None  # to the stage below

    def __call__(self, value: Any) -> Any:
        """One tick."""
        if value is EMPTY:
            self.sent = None
            return EMPTY
        x = value.detach().requires_grad_()
        output = self._part(x)
        if self._loss is not None:
            self._learn(self._loss(output), None)
        elif self.gradient is not None:
            self._learn(output, self.gradient)
        self.sent = x.grad
        return output.detach()

    def _learn(self, output: torch.Tensor, gradient: torch.Tensor | None) -> None:
        self._optimizer.zero_grad()
        output.backward(gradient)  # type: ignore[no-untyped-call]
        self._optimizer.step()


def _worker(tick: Tick, inbox: queue.SimpleQueue[Any], outbox: queue.SimpleQueue[Any], learns: bool) -> None:
    if learns:
        torch.set_num_threads(1)
    else:
        stage_thread()
    get, put = inbox.get, outbox.put
    while (value := get()) is not None:
        try:
            put(tick(value))
        except Exception as error:  # noqa: BLE001 - raised behind the barrier
            put(error)
