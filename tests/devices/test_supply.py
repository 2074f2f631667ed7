"""Supply: streams that nobody else gets, from a runtime library or from PyTorch's pool of 32."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from aiotime.devices import supply
from aiotime.devices.supply import Supply, runtime_streams


class Dealt:
    """A stream of PyTorch's pool."""

    def __init__(self, number: int) -> None:
        self.stream_id = number


class Dealer:
    """What ``torch.cuda`` is to a supply: deals 32 streams per device in turn."""

    def __init__(self, streams: int = 32) -> None:
        self._turn: dict[int, Any] = {}
        self._streams = streams
        self.wrapped: list[tuple[int, torch.device]] = []

    def Stream(self, *, device: torch.device) -> Dealt:  # noqa: N802 - PyTorch's name
        return Dealt(next(self._turn.setdefault(device.index, count())) % self._streams)

    def ExternalStream(self, address: int, *, device: torch.device) -> Dealt:  # noqa: N802 - PyTorch's name
        self.wrapped.append((address, device))
        return Dealt(address)

    def device(self, device: torch.device) -> Any:
        return nullcontext()


def ids(supply: Supply, number: int, *, index: int = 0, shared: bool = True) -> list[int]:
    """The ids of new streams."""
    return [int(supply.new(index, shared=shared).stream_id) for _ in range(number)]  # type: ignore[attr-defined]


def test_what_is_dealt_is_dealt_once() -> None:
    """As many different streams as there are, also where somebody else is dealt some in between; per device."""
    dealer = Dealer()
    made = Supply(dealer, "xpu")
    found = []
    for _ in range(32):
        found += ids(made, 1)
        dealer.Stream(device=torch.device("xpu", 0))
    assert sorted(found) == list(range(32))
    assert sorted(ids(made, 32, index=1)) == list(range(32))


def test_the_stream_of_a_capture_is_never_dealt_again() -> None:
    """Lanes share streams when there are no others, but never that one."""
    made = Supply(Dealer(), "xpu")
    (own,) = ids(made, 1, shared=False)
    later = ids(made, 100)
    assert own not in later
    assert set(later) == set(range(32)) - {own}


def test_no_stream_is_left_for_a_capture() -> None:
    """It gets none that somebody has."""
    made = Supply(Dealer(), "xpu")
    ids(made, 32)
    with pytest.raises(RuntimeError, match="no stream of xpu:0 left"):
        made.new(0, shared=False)


def test_streams_of_its_own_are_wrapped() -> None:
    """Where the runtime library makes them PyTorch deals none."""
    dealer, addresses = Dealer(), count(4096)
    made = Supply(dealer, "cuda", make=lambda index: next(addresses))
    for shared in (True, False):
        made.new(1, shared=shared)
    assert dealer.wrapped == [(4096, torch.device("cuda", 1)), (4097, torch.device("cuda", 1))]


def test_a_runtime_that_makes_none_leaves_it_to_pytorch() -> None:
    """An error of the library costs nothing but the guarantee."""

    def fails(index: int) -> int:
        raise OSError("no")

    assert ids(Supply(Dealer(), "cuda", make=fails), 2) == [0, 1]
    assert ids(Supply(Dealer(), "cuda", make=lambda index: 0), 2) == [0, 1]


class Function:
    """A function of a C library."""

    def __init__(self, act: Any) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> int:
        return int(self._act(*arguments))


class Library:
    """A runtime library: counts what it is asked."""

    def __init__(self, *, code: int = 0) -> None:
        self.asked: list[tuple[str, int]] = []

        def choose(index: int) -> int:
            self.asked.append(("device", index))
            return 0

        def create(address: Any, flags: int) -> int:
            self.asked.append(("stream", flags))
            ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0] = 640
            return code

        self.cudaSetDevice = Function(choose)
        self.cudaStreamCreateWithFlags = Function(create)


def test_the_runtime_library_makes_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device asked for, without a tie to the default stream."""
    library = Library()
    monkeypatch.setattr(supply, "_libraries", lambda: iter([object(), library]))
    runtime_streams.cache_clear()
    make = runtime_streams()
    assert make is not None
    assert make(3) == 640
    assert library.asked == [("device", 3), ("stream", 1)]
    monkeypatch.setattr(supply, "_libraries", lambda: iter([Library(code=2)]))
    runtime_streams.cache_clear()
    failing = runtime_streams()
    assert failing is not None
    with pytest.raises(OSError, match="error 2"):
        failing(0)
    runtime_streams.cache_clear()


def test_without_a_runtime_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch built for CPUs knows of no library, and names that do not exist are passed over."""
    runtime_streams.cache_clear()
    if torch.version.cuda is None and torch.version.hip is None:
        assert runtime_streams() is None
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    assert all(not hasattr(library, "cudaStreamCreateWithFlags") for library in supply._libraries())
    runtime_streams.cache_clear()
