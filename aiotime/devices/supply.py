"""Supply: new streams that nobody else gets.

PyTorch deals its streams from a pool of 32 per device, in turn: the 33rd is the first once more, whoever has that. For
two lanes this means only that they wait for each other. For a capture it is fatal: what another thread launches into
the capturing stream lands in the graph. And the pool is everybody's: a capture in user code may be dealt
a lane's stream.

    the runtime library makes one ──▶ nobody else knows of it          (CUDA, ROCm)
    otherwise: deal, until one comes that we do not have yet           (any other accelerator)

Streams made this way are never destroyed; they go back into the pools of `aiotime.devices.accelerator.Accelerator`.

Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from aiotime.devices.backend import RawStream

DEALT = 64  # streams asked of PyTorch before all are taken to be known
NON_BLOCKING = 1  # flag of the runtime: does not wait for the legacy default stream, nor that for it

Make = Callable[[int], int]  # device index -> the address of a new stream


class Supply:
    """New streams of the accelerators of one kind; any thread.

    Args:
        module: ``torch.cuda`` or another that is like it.
        make: makes a stream without PyTorch; None: those that PyTorch deals.
    """

    def __init__(self, module: Any, kind: str, *, make: Make | None = None) -> None:
        self._module = module
        self._kind = kind
        self._make = make
        self._lock = threading.Lock()
        self._known: set[tuple[int, int]] = set()  # device, id: of those that were dealt
        self._reserved: set[tuple[int, int]] = set()

    def new(self, index: int, *, shared: bool) -> RawStream:
        """A stream on device ``index``; see `aiotime.devices.backend.Backend.new_stream`."""
        device = torch.device(self._kind, index)
        make = self._make if self._make is not None else runtime_streams() if self._kind == "cuda" else None
        if make is not None:
            with self._module.device(device):
                try:
                    address = make(index)
                except OSError:
                    address = 0
            if address:
                stream: RawStream = self._module.ExternalStream(address, device=device)
                return stream
        return self._deal(device, shared=shared)

    def _deal(self, device: torch.device, *, shared: bool) -> RawStream:
        again: RawStream | None = None
        with self._lock:
            for _ in range(DEALT):
                stream: Any = self._module.Stream(device=device)
                key = (device.index, int(stream.stream_id))
                if key not in self._known:
                    self._known.add(key)
                    if not shared:
                        self._reserved.add(key)
                    found: RawStream = stream
                    return found
                if again is None and key not in self._reserved:
                    again = stream
        if not shared or again is None:
            raise RuntimeError(f"PyTorch has no stream of {device} left that nobody else uses")
        return again


@cache
def runtime_streams() -> Make | None:
    """Makes streams through the runtime library that PyTorch has loaded; None where that is not found."""
    prefix = "hip" if torch.version.hip is not None else "cuda"
    for library in _libraries():
        try:
            create = getattr(library, f"{prefix}StreamCreateWithFlags")
            choose = getattr(library, f"{prefix}SetDevice")
        except AttributeError:
            continue
        create.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
        choose.argtypes = [ctypes.c_int]
        create.restype = choose.restype = ctypes.c_int

        def make(index: int, create: Any = create, choose: Any = choose) -> int:
            address = ctypes.c_void_p()
            if (code := choose(index) or create(ctypes.byref(address), NON_BLOCKING)) != 0:
                raise OSError(f"the runtime makes no stream (error {code})")
            return address.value or 0

        return make
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where the runtime may be: by the name that PyTorch's version has, or among what the process has loaded."""
    names: list[str | None] = []
    if torch.version.cuda is not None:  # copies of CUDA's runtime share what they make, through the driver
        major = torch.version.cuda.split(".")[0]
        names = [f"libcudart.so.{major}", f"cudart64_{major}.dll", None]
    elif torch.version.hip is not None:  # two copies of HIP's would know nothing of each other
        names = [None]
    for name in names:
        try:
            yield ctypes.CDLL(name)
        except (OSError, TypeError):  # TypeError: this system has no library without a name
            continue
