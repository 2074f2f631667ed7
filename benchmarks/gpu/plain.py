"""A plain loop over frames, as a good programmer would write it: pinned memory, three streams, frames under way.

    copy-in stream   ── frame n+1 ──▶ slot ──┐
    compute stream   ── frame n: model (or its graph) ──┐
    copy-out stream  ── frame n-1 ──▶ pinned result

``ahead=1`` is the host-synchronised loop: one frame is launched, then waited for.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.nets import Task, frames, net, targets, update
from benchmarks.gpu.place import Place


class Slot:
    """The static memory of one frame under way."""

    def __init__(self, place: Place, picture: torch.Tensor, target: torch.Tensor) -> None:
        self.x = torch.empty_like(picture, device=place.device)
        self.target = torch.empty_like(target, device=place.device)
        self.y = torch.empty_like(target, device=place.device)
        self.host = place.pinned(target)
        self.arrived, self.computed, self.done = place.event(), place.event(), place.event()
        self.compute: Any = None


class PlainLoop:
    """A `benchmarks.gpu.drive.Loop`.

    Args:
        task: of the contest.
        place: where.
        ahead: frames under way.
        graph: replay the step as a CUDA graph, one per slot.
    """

    def __init__(self, task: Task, place: Place, *, ahead: int, graph: bool) -> None:
        self.task = task
        self.place = place
        self.pictures, self.targets = frames(task, place), targets(task, place)
        self.model = net(task.layers).to(place.device)
        self.parameters = list(self.model.parameters())
        if not task.learns:
            self.model.requires_grad_(requires_grad=False)
        self.stream, self.inward, self.outward = place.stream(), place.stream(), place.stream()
        self.ahead = ahead
        # one more than are under way: a result stays readable until the next frame has been pushed
        count = ahead + (ahead > 1)
        self.slots = [Slot(place, self.pictures[0], self.targets[0]) for _ in range(count)]
        self.flying: deque[tuple[int, Slot]] = deque()
        place.synchronize()
        pool = place.pool() if graph else None
        for slot in self.slots:
            self._prepare(slot, pool, graph=graph)

    def _prepare(self, slot: Slot, pool: Any, *, graph: bool) -> None:
        def step() -> None:
            self._step(slot)

        slot.x.zero_()
        slot.target.zero_()
        slot.compute = self.place.captured(step, self.stream, pool=pool) if graph else step

    def _step(self, slot: Slot) -> None:
        if not self.task.learns:
            with torch.no_grad():
                slot.y.copy_(self.model(slot.x))
            return
        y = self.model(slot.x)
        loss = functional.mse_loss(y, slot.target)
        update(self.parameters, torch.autograd.grad(loss, self.parameters))
        slot.y.copy_(y.detach())

    @property
    def in_flight(self) -> int:
        """Frames under way."""
        return len(self.flying)

    def push(self, number: int) -> list[int]:
        """Launch frame ``number``; the numbers of the frames whose results are on the host by now."""
        done = []
        if len(self.flying) == self.ahead:
            done.append(self._finish())
        place, slot = self.place, self.slots[number % len(self.slots)]
        which = number % len(self.pictures)
        with place.on(self.inward):
            slot.x.copy_(self.pictures[which], non_blocking=True)
            if self.task.learns:
                slot.target.copy_(self.targets[which], non_blocking=True)
        self.inward.record_event(slot.arrived)
        self.stream.wait_event(slot.arrived)
        with place.on(self.stream):
            slot.compute()
        self.stream.record_event(slot.computed)
        self.outward.wait_event(slot.computed)
        with place.on(self.outward):
            slot.host.copy_(slot.y, non_blocking=True)
        self.outward.record_event(slot.done)
        self.flying.append((number, slot))
        if self.ahead == 1:
            done.append(self._finish())
        return done

    def _finish(self) -> int:
        number, slot = self.flying.popleft()
        slot.done.synchronize()  # its input is free, too: the copy out came after the model
        return number

    def poll(self) -> list[int]:
        """Frames that have come since."""
        done = []
        while self.flying and self.flying[0][1].done.query():
            done.append(self._finish())
        return done

    def flush(self) -> list[int]:
        """Wait for everything under way."""
        done = []
        while self.flying:
            done.append(self._finish())
        return done

    def result(self, number: int) -> torch.Tensor:
        """The host's copy of a frame's output, until the next one is pushed."""
        return self.slots[number % len(self.slots)].host

    def close(self) -> None:
        """Nothing is under way any more."""
        self.flush()
        self.place.synchronize()
