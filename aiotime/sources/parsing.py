"""Bytes -> frames, without reading anything: raw tensors, .npy arrays and JSON lines, back to back.

``feed(bytes)`` gives the frames completed by them, ``end()`` what was left, or an error when it was cut off.
"""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from aiotime.errors import ConfigurationError, InputError
from aiotime.frame import Sample
from aiotime.sources.conform import Conform, describe, only_tensor, rewrap

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS = ("raw", "npy", "jsonl")
PEEK = 64  # bytes that decide in `sniff`
MAGIC = b"\x93NUMPY"


class Parser(Protocol):
    """Turns bytes, cut anywhere, into samples. What an iterator still holds when it is dropped is lost."""

    def feed(self, data: bytes) -> Iterator[Sample]:
        """The samples that ``data`` completes.

        Raises:
            InputError: the bytes are not what the format promises; the message says where.
        """

    def end(self) -> Iterator[Sample]:
        """Nothing more comes: what was left.

        Raises:
            InputError: the last frame was cut off.
        """


def parser(format: str, *, example: Any) -> Parser:
    """The parser of ``format`` (one of `FORMATS`, or ``"auto"``), making frames like ``example``."""
    if format == "auto":
        return Sniffing(example)
    if format == "raw":
        return RawFrames(example)
    if format == "npy":
        return NpyFrames(example)
    if format == "jsonl":
        return JsonLines(example)
    raise ConfigurationError(f"format must be one of 'auto', {', '.join(map(repr, FORMATS))}, not {format!r}")


def sniff(head: bytes) -> str:
    """The format of a stream that begins with ``head`` (`PEEK` bytes, fewer where it is shorter).

    Raw bytes are what is neither the magic of .npy nor printable text that opens a list or an object.
    """
    if head.startswith(MAGIC):
        return "npy"
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return "jsonl" if printable and head.lstrip()[:1] in (b"[", b"{") else "raw"


class Sniffing:
    """Looks at the first bytes, then is the parser of their format."""

    def __init__(self, example: Any) -> None:
        self._example = example
        self._head = b""
        self._parser: Parser | None = None

    def feed(self, data: bytes) -> Iterator[Sample]:
        """See `Parser`."""
        if self._parser is None:
            self._head += data
            whole_line = b"\n" in self._head and sniff(self._head) == "jsonl"  # a slow writer of short lines
            if len(self._head) < PEEK and not whole_line and not self._head.startswith(MAGIC):
                return
            data = self._decide()
        assert self._parser is not None
        yield from self._parser.feed(data)

    def end(self) -> Iterator[Sample]:
        """See `Parser`."""
        if self._parser is None and self._head:
            yield from self.feed_all()
        if self._parser is not None:
            yield from self._parser.end()

    def feed_all(self) -> Iterator[Sample]:
        """Decide by what came, however little."""
        head = self._decide()
        assert self._parser is not None
        yield from self._parser.feed(head)

    def _decide(self) -> bytes:
        head, self._head = self._head, b""
        self._parser = parser(sniff(head[:PEEK]), example=self._example)
        return head


class RawFrames:
    """Frames of one size back to back: the bytes of a contiguous tensor, in this machine's byte order.

    Without an example there is no size to cut by, so one is required.
    """

    def __init__(self, example: Any) -> None:
        if example is None:
            raise ConfigurationError("raw frames need example=: its shape and dtype say how many bytes a frame has")
        leaf = only_tensor(example)
        self._example = example
        self._dtype, self._shape = leaf.dtype, leaf.shape
        self._nbytes = leaf.numel() * leaf.element_size()
        if self._nbytes == 0:
            raise ConfigurationError(f"raw frames need an example with bytes in it, not {describe(example)}")
        self._buffer = bytearray()
        self._count = 0

    def feed(self, data: bytes) -> Iterator[Sample]:
        """See `Parser`."""
        self._buffer += data
        buffer = self._buffer
        if len(buffer) < self._nbytes:
            return
        self._buffer = buffer[len(buffer) - len(buffer) % self._nbytes :]
        for start in range(0, len(buffer) - self._nbytes + 1, self._nbytes):
            leaf = torch.frombuffer(buffer[start : start + self._nbytes], dtype=self._dtype).reshape(self._shape)
            self._count += 1
            yield Sample(rewrap(self._example, leaf))

    def end(self) -> Iterator[Sample]:
        """See `Parser`."""
        if self._buffer:
            raise InputError(
                f"the stream ended within frame {self._count}: {len(self._buffer)} of {self._nbytes} bytes came "
                f"(a frame is {describe(self._example)}; check the example's shape and dtype)",
                frame=self._count,
            )
        return iter(())


class NpyFrames:
    """Arrays as ``numpy.save`` writes them, back to back.

    A uint8 array of two or three dimensions that differs from the example is taken for a picture (see `Conform`);
    any other must have the example's shape (its leading 1 may be missing). Values are cast to the
    example's dtype among floating-point types and among integers. Pickled objects are refused.
    """

    def __init__(self, example: Any) -> None:
        self._example = example
        self._leaf = None if example is None else only_tensor(example)
        self._buffer = bytearray()
        self._count = 0

    def feed(self, data: bytes) -> Iterator[Sample]:
        """See `Parser`."""
        self._buffer += data
        while (leaf := self._take()) is not None:
            payload = self._fit(leaf)
            self._count += 1
            yield Sample(payload)

    def end(self) -> Iterator[Sample]:
        """See `Parser`."""
        if self._buffer:
            raise self._wrong(f"was cut off: the stream ended after {len(self._buffer)} bytes of it")
        return iter(())

    def _take(self) -> Tensor | None:
        """The next whole array, None while it is not complete."""
        import numpy as np

        head = bytes(self._buffer[:12])
        if not MAGIC.startswith(head[:6]):
            raise self._wrong("does not begin as a .npy array does")
        if len(head) < 12:
            return None
        start = 10 if head[6] == 1 else 12
        body = start + int.from_bytes(head[8:start], "little")
        if len(self._buffer) < body:
            return None
        header = io.BytesIO(bytes(self._buffer[8:body]))
        try:
            read = np.lib.format.read_array_header_1_0 if head[6] == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(header)
        except ValueError as error:
            raise self._wrong(f"has a damaged header: {error}") from error
        if dtype.hasobject:
            raise self._wrong("holds pickled objects; save numbers")
        end = body + math.prod(shape) * dtype.itemsize
        if len(self._buffer) < end:
            return None
        array = np.frombuffer(bytes(self._buffer[body:end]), dtype=dtype, count=math.prod(shape))
        array = array.reshape(shape, order="F" if fortran else "C")
        del self._buffer[:end]
        try:
            return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise self._wrong(f"is of type {dtype}, which torch lacks") from error

    def _fit(self, leaf: Tensor) -> Any:
        if self._leaf is None:
            return leaf
        want = self._leaf
        if leaf.shape == want.shape[1:] and want.shape[:1] == (1,):
            leaf = leaf.unsqueeze(0)
        if leaf.shape != want.shape and leaf.dtype == torch.uint8 and leaf.ndim in (2, 3):
            return Conform(self._example)(leaf)
        castable = leaf.dtype.is_floating_point == want.dtype.is_floating_point and leaf.dtype != torch.bool
        if leaf.shape != want.shape or not (castable or leaf.dtype == want.dtype):
            raise self._wrong(f"is {describe(leaf)}; expected {describe(want)}, or a uint8 picture")
        return rewrap(self._example, leaf.to(want.dtype))

    def _wrong(self, why: str) -> InputError:
        return InputError(f"array {self._count} {why}", frame=self._count)


class JsonLines:
    """One frame a line: nested lists, or an object with ``"input"`` and perhaps ``"key"``.

    Where the example is a tuple or a dict, so is the input:
    ``{"ids": [[1, 2]]}`` or ``{"input": {"ids": [[1, 2]]}, "key": "a"}``.
    Shapes are left to the pipeline's door, which refuses a wrong one by its own rules. Empty lines are passed over.
    """

    def __init__(self, example: Any) -> None:
        self._example = torch.zeros(()) if example is None else example
        self._buffer = bytearray()
        self._line = 0

    def feed(self, data: bytes) -> Iterator[Sample]:
        """See `Parser`."""
        new = len(self._buffer)
        self._buffer += data
        cut = self._buffer.rfind(b"\n", new) + 1
        if cut:
            lines, self._buffer = self._buffer[:cut], self._buffer[cut:]
            yield from self._samples(bytes(lines).split(b"\n")[:-1])

    def end(self) -> Iterator[Sample]:
        """See `Parser`. The last line needs no newline."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        return self._samples([rest])

    def _samples(self, lines: list[bytes]) -> Iterator[Sample]:
        for line in lines:
            self._line += 1
            if line.strip():
                try:
                    yield self._sample(line)
                except InputError as error:  # this line alone: it takes its place in the order, as a refused frame
                    yield Sample(error, key=error.key)

    def _sample(self, line: bytes) -> Sample:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {self._line} is not JSON: {error}") from error
        key = None
        taken = isinstance(self._example, dict) and "input" in self._example  # by the model itself
        if isinstance(value, dict) and "input" in value and not taken:
            key = value.get("key")
            key = json.dumps(key) if isinstance(key, list | dict) else key  # a key must be hashable
            value = value["input"]
        try:
            return Sample(fill(self._example, value), key=key)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"line {self._line} does not hold {describe(self._example)}: {error}", key=key) from error


def fill(example: Any, value: Any) -> Any:
    """``value``, nested lists and dicts, with tensors where ``example`` has them.

    Raises:
        TypeError, ValueError: the structures differ, or a list is ragged or holds no numbers.
    """
    if isinstance(example, Tensor):
        return torch.tensor(value, dtype=example.dtype)
    if isinstance(example, dict):
        if not isinstance(value, dict) or set(value) != set(example):
            raise ValueError(f"expected an object with {', '.join(sorted(map(str, example)))}")
        return {key: fill(part, value[key]) for key, part in example.items()}
    if isinstance(example, tuple | list):
        if not isinstance(value, list) or len(value) != len(example):
            raise ValueError(f"expected a list of {len(example)} parts")
        return tuple(fill(part, one) for part, one in zip(example, value, strict=True))
    return value
