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
from aiotime.planning.payload import cloned
from aiotime.planning.piece import Piece


def can_rehearse(devices: Sequence[Device]) -> bool:
    """Whether the devices live on real time; simulated ones have nothing to contend for."""
    return all(isinstance(device.clock, RealClock) for device in devices)


def rehearse(
    pieces: Sequence[Piece], devices: Sequence[Device], example: Any, *, seconds: float = 0.3
) -> tuple[float, ...]:
    """Mean seconds per frame of each stage while all run at once, each on its own recorded input.

    Places the pieces on the devices. Takes about ``seconds``, longer where a few calls of a stage take longer.
    Blocks: not for use on a running loop.
    """
    actors = []
    value = cloned(example)
    for piece, device in zip(pieces, devices, strict=True):
        device.place(piece.module)
        actors.append(_Actor(piece, device, value, seconds))
        with torch.inference_mode():
            _, value = device.measure(on_a_copy(piece), value, seconds=0.0)
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
    begin = max(actor.starts[0] for actor in actors)
    end = max(actor.through for actor in actors)
    return tuple(actor.mean(begin, end) for actor in actors)


def on_a_copy(piece: Piece) -> Callable[[Any], Any]:
    """``piece``, leaving its input as it was whatever it does in place."""
    return lambda value: piece(cloned(value))


class _Actor:
    """One stage in its thread; it plays on until every other has been measured."""

    def __init__(self, piece: Piece, device: Device, value: Any, seconds: float) -> None:
        self.piece = piece
        self.device = device
        self.value = cloned(value)
        self.seconds = seconds
        self.starts: list[float] = []
        self.through = 0.0  # when its first measurement was complete, 0.0 before
        self.alone = 0.0
        self.error: BaseException | None = None

    def play(self, curtain: threading.Barrier, cast: Sequence[_Actor]) -> None:
        starts, piece, clock = self.starts, self.piece, time.perf_counter

        def timed(value: Any) -> Any:
            starts.append(clock())
            return piece(value)

        curtain.wait()
        try:
            while not self.through or not all(actor.through or actor.error for actor in cast):
                self.alone, _ = self.device.measure(timed, self.value, seconds=self.seconds)
                self.through = self.through or clock()
        except BaseException as error:  # raised again on the caller's thread
            self.error = error

    def mean(self, begin: float, end: float) -> float:
        """Seconds per call while all were playing."""
        during = [start for start in self.starts if begin <= start <= end]
        if len(during) < 2:
            return self.alone
        return (during[-1] - during[0]) / (len(during) - 1)
