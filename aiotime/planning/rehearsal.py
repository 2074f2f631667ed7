"""Stages side by side, as they will run: what they take when they get in each other's way.

Layers of microseconds hold Python's lock most of the time, so two threads of them run slower than one; convolutions
release it and run at full speed. No sum of single measurements tells these apart; running the stages together does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aiotime.devices.base import Device, RealClock
from aiotime.learning.rule import Rule
from aiotime.planning.payload import cloned
from aiotime.planning.piece import Piece
from aiotime.planning.practice import Practice
from aiotime.planning.stopwatch import Stopwatch, cores

# seconds per operation from which Python's lock is no matter. Below it, time spent waiting for a core is not taken off:
# threads that did not get to run at once did not wait for each other either, and would look better than they are
LONG_STEP = 50e-6
PHASES = 3  # what a step does when it learns: forward, backward, update


def can_rehearse(devices: Sequence[Device]) -> bool:
    """Whether the devices live on real time; simulated ones have nothing to contend for."""
    return all(isinstance(device.clock, RealClock) for device in devices)


def has_real_calls(device: Device) -> bool:
    """Whether a call on ``device`` takes as long as its work; a launch on an accelerator returns at once."""
    return device.on_host and isinstance(device.clock, RealClock)


def rehearse(
    pieces: Sequence[Piece],
    devices: Sequence[Device],
    example: Any,
    *,
    seconds: float = 0.3,
    learner: Rule | None = None,
    programs: Sequence[Callable[[Any], Any] | None] | None = None,
) -> tuple[float, ...]:
    """Mean seconds per frame of each stage while all run at once, each on its own recorded input.

    With ``learner`` each does forward, backward and update, on copies of its parameters. Places the pieces on the
    devices. ``programs`` stand for pieces that were compiled. Takes about ``seconds``, longer where a few calls of a
    stage take longer. Blocks: not for use on a running loop.
    """
    # with fewer cores than threads, waiting for one is what is to be seen
    enough = sum(getattr(device, "threads", 1) for device in devices) <= cores()
    actors = []
    value = cloned(example)
    below = False  # something there learns
    for at, (piece, device) in enumerate(zip(pieces, devices, strict=True)):
        device.place(piece.module)
        program = None if programs is None else programs[at]
        act: Callable[[Any], Any] = program or piece
        steps = piece.steps if program is None else 1
        if learner is not None:
            keep_old = learner.versions(at, len(pieces)) > 1
            act = practice = Practice.of(piece, learner, differentiable=below, keep_old=keep_old, fn=act)
            below = practice.active
            steps *= PHASES if below else 1
        with torch.inference_mode():
            alone, following = device.measure(on_a_copy(act), value, seconds=0.0)
        actors.append(_Actor(act, device, value, seconds, waits=enough and alone >= LONG_STEP * steps))
        value = following
    curtain = threading.Barrier(len(actors))
    threads = [
        threading.Thread(target=actor.play, args=(curtain, actors), name=f"rehearse:{actor.device.name}")
        for actor in actors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actor in actors:
        if actor.error is not None:
            raise actor.error
    begin = max(actor.watch.began for actor in actors)
    end = max(actor.through for actor in actors)
    return tuple(
        (actor.watch.seconds(begin, end) if has_real_calls(actor.device) else None) or actor.alone for actor in actors
    )


def on_a_copy(act: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``act``, leaving its input as it was whatever it does in place."""
    return lambda value: act(cloned(value))


class _Actor:
    """One stage in its thread; it plays on until every other has been measured."""

    def __init__(self, act: Callable[[Any], Any], device: Device, value: Any, seconds: float, *, waits: bool) -> None:
        self.watch = Stopwatch(act, waits=waits)
        self.device = device
        self.value = cloned(value)
        self.seconds = seconds
        self.through = 0.0  # when its first measurement was complete, 0.0 before
        self.alone = 0.0  # what the device says
        self.error: BaseException | None = None

    def play(self, curtain: threading.Barrier, cast: Sequence[_Actor]) -> None:
        curtain.wait()
        try:
            while not self.through or not all(actor.through or actor.error for actor in cast):
                self.alone, _ = self.device.measure(self.watch, self.value, seconds=self.seconds)
                self.through = self.through or time.perf_counter()
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            self.error = error
