"""PARTIME's lock-step, host-synchronised scheme, stated anew: all stages work at once, then all wait for the slowest.

    tick t     stage 0: frame t      stage 1: frame t-1     …     stage S-1: frame t-S+1        each on its own stream
               ────────────────────────────── the host synchronises ──────────────────────────────
    tick t+1   each stage's output is the next one's input

Learning is its rule (Sideways): a stage's backward takes this tick's own graph and the gradient that the stage above
made a tick before, and the weights are updated at once. A frame comes out S-1 ticks after it went in.

Better than the published scheme in what would slow it without need: copies to and from the host are asynchronous and
from pinned memory, stages without a frame are left out (where nothing is captured), and ticks go on while anything is
under way, so the last frames come out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.nets import Task, frames, parts, targets, update
from benchmarks.gpu.place import Place


class LockStep:
    """A `benchmarks.gpu.drive.Loop`.

    Args:
        task: of the contest.
        place: where.
        stages: on as many streams of the one device.
        graph: a whole tick is one CUDA graph.
    """

    def __init__(self, task: Task, place: Place, *, stages: int, graph: bool) -> None:
        self.task = task
        self.place = place
        self.pictures, self.targets = frames(task, place), targets(task, place)
        self.parts = [part.to(place.device) for part in parts(task.layers, stages)]
        self.parameters = [list(part.parameters()) for part in self.parts]
        self.main = place.stream()
        self.streams = [place.stream() for _ in self.parts]
        self.holding: list[int | None] = [None] * stages  # the frame in each stage's input
        self.host = place.pinned(self.targets[0])
        self.results: dict[int, torch.Tensor] = {}
        self.fork, self.joins = place.event(), [place.event() for _ in self.parts]
        self.inputs, self.grads = self._buffers()
        self.target = torch.zeros_like(self.targets[0], device=place.device)
        self.y = torch.zeros_like(self.target)
        place.synchronize()
        self.graph: Any = None
        if graph:
            self.graph = place.captured(lambda: self._tick([True] * stages), self.main)

    def _buffers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Static inputs, and gradients of the outputs, of every stage."""
        inputs, grads = [], []
        with torch.no_grad():
            value = torch.zeros_like(self.pictures[0], device=self.place.device)
            for part in self.parts:
                inputs.append(torch.zeros_like(value))
                value = part(value)
                grads.append(torch.zeros_like(value))
        return inputs, grads

    def _tick(self, working: list[bool]) -> None:
        """All stages that work, each on its stream; forked from and joined to the main stream."""
        place, last = self.place, len(self.parts) - 1
        outputs: list[torch.Tensor | None] = [None] * len(self.parts)
        passed: list[torch.Tensor | None] = [None] * len(self.parts)
        self.main.record_event(self.fork)
        for k, stream in enumerate(self.streams):
            if not working[k]:
                continue
            stream.wait_event(self.fork)
            with place.on(stream):
                outputs[k], passed[k] = self._stage(k, last=k == last)
            stream.record_event(self.joins[k])
        for k, join in enumerate(self.joins):
            if working[k]:
                self.main.wait_event(join)
        with place.on(self.main), torch.no_grad():  # what everybody has made becomes what the neighbours take
            for k in range(last):
                if (output := outputs[k]) is not None:
                    self.inputs[k + 1].copy_(output)
                if (grad := passed[k + 1]) is not None:
                    self.grads[k].copy_(grad)
            if (output := outputs[last]) is not None:
                self.y.copy_(output)

    def _stage(self, k: int, *, last: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.task.learns:
            with torch.no_grad():
                return self.parts[k](self.inputs[k]), None
        x = self.inputs[k].detach().requires_grad_(k > 0)
        y = self.parts[k](x)
        wanted = [*self.parameters[k], *([x] if k > 0 else [])]
        if last:
            grads = torch.autograd.grad(functional.mse_loss(y, self.target), wanted)
        else:
            grads = torch.autograd.grad(y, wanted, grad_outputs=self.grads[k])
        update(self.parameters[k], grads[: len(self.parameters[k])])
        return y.detach(), grads[-1] if k > 0 else None

    @property
    def in_flight(self) -> int:
        """Frames that are in some stage's input."""
        return sum(frame is not None for frame in self.holding)

    def push(self, number: int) -> list[int]:
        """A tick with a new frame."""
        return self._go(number)

    def poll(self) -> list[int]:
        """A tick without a new frame, so that those under way come out."""
        return self._go(None) if self.in_flight else []

    def flush(self) -> list[int]:
        """Ticks until nothing is under way."""
        done = []
        while self.in_flight:
            done += self._go(None)
        return done

    def _go(self, number: int | None) -> list[int]:
        place = self.place
        self.holding[0] = number
        leaving = self.holding[-1]
        with place.on(self.main):
            if number is not None:
                self.inputs[0].copy_(self.pictures[number % len(self.pictures)], non_blocking=True)
            if self.task.learns and leaving is not None:
                self.target.copy_(self.targets[leaving % len(self.targets)], non_blocking=True)
        if self.graph is not None:
            self.graph()
        else:
            self._tick([frame is not None for frame in self.holding])
        if leaving is not None:
            with place.on(self.main):
                self.host.copy_(self.y, non_blocking=True)
        place.synchronize()  # the scheme's own: nobody begins the next tick before all have ended this one
        self.holding = [None, *self.holding[:-1]]
        return [] if leaving is None else [leaving]

    def result(self, number: int) -> torch.Tensor:
        """The newest output."""
        return self.host

    def close(self) -> None:
        """Give up what is under way."""
        self.place.synchronize()
