"""Frames as bytes, from a file (blocking) or from a pipe (asynchronous). The formats live in parsing.py."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aiotime.errors import ConfigurationError
from aiotime.sources.parsing import PEEK, parser, sniff

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from aiotime.frame import Sample

CHUNK = 1 << 20  # bytes read at once; a pipe gives at most what it holds


class Recording:
    """The frames in a file of raw tensors, .npy arrays or JSON lines; iterable again and again.

    Args:
        path: the file.
        example: a frame as the model takes it; required for raw tensors.
        format: ``"raw"``, ``"npy"`` or ``"jsonl"``; ``"auto"`` looks at the first bytes.

    Raises:
        ConfigurationError: no such file, or no such format.
        InputError: while iterating: the bytes are not what the format promises.
    """

    live = False

    def __init__(self, path: str | os.PathLike[str], *, example: Any = None, format: str = "auto") -> None:
        self.name = os.fspath(path)
        self.length: int | None = None
        self._example, self._format = example, format
        try:
            with Path(self.name).open("rb") as file:
                head = file.read(PEEK)
        except OSError as error:
            raise ConfigurationError(f"{self.name} cannot be read: {error.strerror or error}") from error
        if format == "auto" and head:
            self._format = sniff(head)
        parser(self._format, example=example)  # refuses what cannot work now, not at the first frame

    def __iter__(self) -> Iterator[Sample]:
        frames = parser(self._format, example=self._example)
        with Path(self.name).open("rb") as file:
            while data := file.read(CHUNK):
                yield from frames.feed(data)
        yield from frames.end()


class Stdin:
    """Frames that come through a pipe: read on the event loop, so it never blocks and can be cancelled at any point.

    Iterable once. Reads no further ahead than one read of the pipe.

    Args:
        example: a frame as the model takes it; required for raw tensors.
        format: ``"raw"``, ``"npy"`` or ``"jsonl"``; ``"auto"`` looks at the first bytes.
        file: what to read instead of this process's standard input: a binary file with or without a descriptor.

    Raises:
        ConfigurationError: standard input is a terminal or closed, or it was read before.
        InputError: while iterating: the bytes are not what the format promises.
    """

    live = False
    length: int | None = None

    def __init__(self, *, example: Any = None, format: str = "auto", file: BinaryIO | None = None) -> None:
        self.name = "stdin"
        if file is None and sys.stdin is None:
            raise ConfigurationError("this process has no stdin to read frames from")
        self._file = sys.stdin.buffer if file is None else file
        self._descriptor = descriptor(self._file)
        if self._descriptor is not None and os.isatty(self._descriptor):
            raise ConfigurationError(
                "stdin is a terminal: pipe frames into it (raw tensors of the example's shape and dtype back to back, "
                ".npy arrays, or JSON lines), as in `cat frames.jsonl | aiotime run …`"
            )
        self._parser = parser(format, example=example)
        self._taken = False

    def __aiter__(self) -> AsyncGenerator[Sample, None]:
        if self._taken:
            raise ConfigurationError(f"{self.name} can be read once; make a new source for a new pipe")
        self._taken = True
        if self._descriptor is not None and pollable(self._descriptor):
            return self._from_pipe(self._descriptor)
        return self._from_file()

    async def _from_pipe(self, descriptor: int) -> AsyncGenerator[Sample, None]:
        blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)  # another reader of the same pipe may be quicker than we are
        try:
            while True:
                await readable(descriptor)
                try:
                    data = os.read(descriptor, CHUNK)
                except BlockingIOError:
                    continue
                if not data:
                    break
                for sample in self._parser.feed(data):
                    yield sample
            for sample in self._parser.end():
                yield sample
        finally:
            os.set_blocking(descriptor, blocking)

    async def _from_file(self) -> AsyncGenerator[Sample, None]:
        while data := await asyncio.to_thread(self._file.read, CHUNK):
            for sample in self._parser.feed(data):
                yield sample
        for sample in self._parser.end():
            yield sample


async def readable(descriptor: int) -> None:
    """Wait until ``descriptor`` has bytes or its end to give."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def descriptor(file: BinaryIO) -> int | None:
    """The file descriptor behind ``file``, None for a file in memory."""
    try:
        return file.fileno()
    except (OSError, AttributeError, ValueError):
        return None


def pollable(descriptor: int) -> bool:
    """True for pipes and sockets; a loop cannot wait for files, which never make one wait for long either."""
    if sys.platform == "win32":  # its loop cannot wait for a pipe: read on a thread
        return False
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
