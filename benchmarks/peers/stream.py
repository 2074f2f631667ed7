"""What goes into a contender and what comes out: feeds of frames and the sink that takes the outputs.

    pacer (another process) ──pipe──▶ Arriving ─▶ contender ─▶ Sink       latency = taken − arrived
                                      Counted  ─▶ contender ─▶ Sink       rate = frames / (last − first taken)

A feed is iterated plainly or asynchronously, as the contender likes it. Frames arrive over a pipe, as they would from a
camera or a socket: whoever waits for the next one waits in the kernel and holds no lock of Python.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import cycle, islice
from time import perf_counter
from typing import Any, Protocol

STAMP = struct.Struct("d")  # when a frame arrived, in seconds of CLOCK_MONOTONIC, which all processes share


class Feed(Protocol):
    """Frames, for whoever iterates, plainly or asynchronously; once."""

    number: int

    def __iter__(self) -> Iterator[Any]: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...


class Counted:
    """``number`` frames, as fast as they are asked for."""

    def __init__(self, frames: Sequence[Any], number: int) -> None:
        self.frames = frames
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return islice(cycle(self.frames), self.number)

    async def __aiter__(self) -> AsyncIterator[Any]:
        for frame in islice(cycle(self.frames), self.number):
            yield frame


class Arriving:
    """``number`` frames, each when its stamp comes out of the pipe ``source``; ``stamps`` says when that was."""

    def __init__(self, frames: Sequence[Any], number: int, source: int) -> None:
        self.frames = frames
        self.number = number
        self.stamps: list[float] = []
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        frames = cycle(self.frames)
        left = self.number
        while left:
            arrived = self._read(left)
            left -= arrived
            for _ in range(arrived):
                yield next(frames)

    async def __aiter__(self) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        frames = cycle(self.frames)
        left = self.number
        waiting = asyncio.Event()
        arrived: deque[int] = deque()

        def readable() -> None:
            arrived.append(self._read(self.number - len(self.stamps)))
            if len(self.stamps) == self.number:
                loop.remove_reader(self._source)
            waiting.set()

        loop.add_reader(self._source, readable)
        try:
            while left:
                await waiting.wait()
                waiting.clear()
                while arrived:
                    count = arrived.popleft()
                    left -= count
                    for _ in range(count):
                        yield next(frames)
        finally:
            loop.remove_reader(self._source)

    def _read(self, most: int) -> int:
        read = os.read(self._source, min(most, 512) * STAMP.size)
        if not read:
            raise EOFError("the pacer has gone")
        self.stamps.extend(stamp for (stamp,) in STAMP.iter_unpack(read))
        return len(read) // STAMP.size


class Sink:
    """Takes every output in order: notes the time, and keeps the output where it is to be checked."""

    def __init__(self, *, keep: bool = False) -> None:
        self.times: list[float] = []
        self.outputs: list[Any] = []
        self.keep = keep

    def take(self, output: Any) -> None:
        """One output; errors of a contender are raised, not taken."""
        self.times.append(perf_counter())
        if self.keep:
            self.outputs.append(output)
