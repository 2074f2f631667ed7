"""The few calls made to an accelerator's runtime, behind one narrow interface, and PyTorch's own behind it.

    lane, staging, marks ──▶ Backend ──┬── TorchBackend("cuda" | "xpu" | …)   this module
                                       └── PretendBackend                     pretend.py, for tests

Written on what ``torch.cuda`` and ``torch.xpu`` have in common (``torch.get_device_module``), so that another
kind of accelerator needs no new room; ROCm calls itself "cuda". One difference is kept: only
``torch.cuda.Event`` can block without spinning, the neutral ``torch.Event(blocking=True)`` ignores it.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from aiotime.devices.supply import Supply

if TYPE_CHECKING:
    from aiotime.devices.accelerator import Accelerator

HOST = -1  # of `Backend.where`: in the host's memory
NOWHERE = -2  # of `Backend.where`: not an array; it travels as it is
FORBIDDEN = {  # what CUDA answers while a capture forbids the question; the device is well
    900: "operation not permitted when stream is capturing",
    901: "operation failed due to a previous error during capture",
    906: "operation would make the legacy stream depend on a capturing blocking stream",
}


class RawEvent(Protocol):
    """An event of the runtime."""

    def query(self) -> bool:
        """True once everything before its newest record has been done; also before its first record."""

    def synchronize(self) -> None:
        """Block the thread until then."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds on the device between two passed timing events."""


class RawStream(Protocol):
    """A stream of the runtime: work in order."""

    def record_event(self, event: Any, /) -> Any:
        """Put ``event`` behind the work queued so far."""

    def wait_event(self, event: Any, /) -> None:
        """Work queued from now on waits, on the device, for the newest record of ``event``."""

    def synchronize(self) -> None:
        """Block the thread until the queue is empty."""


class Graph(Protocol):
    """Work that was captured, to be queued as a whole. What it computes in belongs to it."""

    def replay(self) -> None:
        """Queue it on the current stream of its device."""


class Backend(Protocol):
    """An accelerator's runtime. Copies are queued on the current stream of the devices that take part."""

    kind: str
    accelerators: dict[int, Accelerator]  # what is shared per device; see Accelerator.of

    def count(self) -> int:
        """Usable devices."""

    def absence(self) -> str:
        """Why there is none."""

    def describe(self, index: int) -> str:
        """The device's model, the same for devices of the same speed."""

    def new_stream(self, index: int, *, shared: bool = True) -> RawStream:
        """A stream on device ``index``. Never for one use: cached memory would be stranded on it.

        Where the runtime has no more of them, one that was given out before, unless ``shared`` is False: then it raises
        RuntimeError. One given out with ``shared=False`` is never given out again.
        """

    def new_event(self, *, timing: bool = False) -> RawEvent:
        """An event whose ``synchronize`` sleeps rather than spins; with ``timing`` it may spin."""

    def on(self, *streams: Any) -> AbstractContextManager[Any]:
        """Make ``streams`` current for this thread, and the device of the last one. Never across an await."""

    def synchronize(self, index: int) -> None:
        """Block the thread until the device has nothing left to do, on any stream. Not while anybody captures on it."""

    def current(self, index: int) -> RawStream:
        """The calling thread's current stream of device ``index``."""

    def capture(self, call: Callable[[], Any], stream: Any) -> tuple[Graph, Any]:
        """Run ``call`` with what it queues kept in a graph instead of run, and with ``stream`` current.

        Waits of other threads for single events and streams go on meanwhile; a wait for the whole device voids it.
        """

    def forbidden(self, error: BaseException) -> bool:
        """Does ``error`` say only that somebody is capturing, so that this may not be asked now?"""

    def where(self, leaf: Any) -> int:
        """The index of the device of this kind that holds ``leaf``, or HOST, or NOWHERE."""

    def stageable(self, leaf: Any) -> bool:
        """Can this host array be copied into a plain pinned buffer?"""

    def is_pinned(self, leaf: Any) -> bool:
        """Does this host array lie in pinned memory already?"""

    def layout(self, leaf: Any) -> Hashable:
        """Equal for host arrays that fit the same view of a buffer."""

    def nbytes(self, leaf: Any) -> int:
        """Bytes of its elements."""

    def pinned(self, nbytes: int) -> Any:
        """A pinned buffer of bytes."""

    def carve(self, buffer: Any, leaf: Any) -> Any:
        """A view of the start of ``buffer`` with the layout of ``leaf``."""

    def fill(self, view: Any, leaf: Any) -> None:
        """Copy host to host, now."""

    def send(self, leaf: Any, index: int) -> Any:
        """A copy of ``leaf`` on device ``index``, queued, not waited for."""

    def download(self, leaf: Any) -> Any:
        """A copy of a device's ``leaf`` in pinned memory, queued, not waited for. The memory is the caller's."""

    def fetch(self, leaf: Any) -> Any:
        """A copy of ``leaf`` on the host; blocks the thread."""

    def blank(self, nbytes: int, where: int) -> Any:
        """``nbytes`` of bytes on a device, or pinned on the host."""

    def place(self, module: Any, index: int) -> Any:
        """Move a module's parameters and buffers to device ``index``, done on return."""


class TorchBackend:
    """PyTorch's runtime for accelerators of ``kind``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.accelerators: dict[int, Accelerator] = {}
        self._module: Any = torch.get_device_module(kind)
        if kind == "cpu" or not hasattr(self._module, "Stream"):
            raise AttributeError(f"torch.{kind} has no streams")
        self._supply = Supply(self._module, kind)

    def count(self) -> int:
        return int(self._module.device_count()) if self._module.is_available() else 0

    def absence(self) -> str:
        if self.kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            return f"this PyTorch ({torch.__version__}) was built without CUDA"
        return f"PyTorch {torch.__version__} finds no usable {self.kind} device or no driver for it"

    def describe(self, index: int) -> str:
        return str(self._module.get_device_name(index))

    def new_stream(self, index: int, *, shared: bool = True) -> RawStream:
        return self._supply.new(index, shared=shared)

    def new_event(self, *, timing: bool = False) -> RawEvent:
        options: dict[str, bool] = {"enable_timing": timing}
        if self.kind == "cuda":
            options["blocking"] = not timing
        event: RawEvent = self._module.Event(**options)
        return event

    def on(self, *streams: Any) -> AbstractContextManager[Any]:
        if len(streams) == 1:
            context: AbstractContextManager[Any] = self._module.stream(streams[0])
            return context
        return self._on_all(streams)

    @contextmanager
    def _on_all(self, streams: tuple[Any, ...]) -> Iterator[None]:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(self._module.stream(stream))
            yield

    def synchronize(self, index: int) -> None:
        self._module.synchronize(torch.device(self.kind, index))

    def current(self, index: int) -> RawStream:
        stream: RawStream = self._module.current_stream(torch.device(self.kind, index))
        return stream

    def capture(self, call: Callable[[], Any], stream: Any) -> tuple[Graph, Any]:
        # not ``torch.cuda.graph``: it waits for the whole device and gives all cached memory back first
        graph = self._module.CUDAGraph()
        with self.on(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = call()
            finally:
                graph.capture_end()
        return graph, result

    def forbidden(self, error: BaseException) -> bool:
        code = getattr(error, "error_code", None)
        if code is not None:
            return code in FORBIDDEN
        return isinstance(error, RuntimeError) and any(said in str(error) for said in FORBIDDEN.values())

    def where(self, leaf: Any) -> int:
        if not isinstance(leaf, torch.Tensor):
            return NOWHERE
        device = leaf.device
        return device.index if device.type == self.kind else HOST

    def stageable(self, leaf: Any) -> bool:
        return leaf.layout is torch.strided and not leaf.is_quantized

    def is_pinned(self, leaf: Any) -> bool:
        return bool(leaf.is_pinned())

    def layout(self, leaf: Any) -> Hashable:
        return leaf.shape, leaf.stride(), leaf.dtype

    def nbytes(self, leaf: Any) -> int:
        return int(leaf.numel() * leaf.element_size())

    def pinned(self, nbytes: int) -> Any:
        with torch.inference_mode(mode=False):  # ordinary memory, whatever mode its users are in
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def carve(self, buffer: Any, leaf: Any) -> Any:
        strides = torch.empty_like(leaf, device="meta").stride()  # those of a dense copy
        with torch.inference_mode(mode=False):
            return torch.empty(0, dtype=leaf.dtype).set_(buffer.untyped_storage(), 0, leaf.shape, strides)

    def fill(self, view: Any, leaf: Any) -> None:
        view.copy_(leaf.detach())

    def send(self, leaf: Any, index: int) -> Any:
        return leaf.detach().to(torch.device(self.kind, index), non_blocking=True)

    def download(self, leaf: Any) -> Any:
        if leaf.layout is not torch.strided or leaf.is_quantized:
            return self.fetch(leaf)
        host = torch.empty_like(leaf, device="cpu", pin_memory=True, requires_grad=False)
        leaf = leaf.detach()
        if host.stride() != leaf.stride():  # a view with gaps: copied as it is, PyTorch would wait for it
            leaf = leaf.clone()
        return host.copy_(leaf, non_blocking=True)

    def fetch(self, leaf: Any) -> Any:
        return leaf.detach().cpu()

    def blank(self, nbytes: int, where: int) -> Any:
        if where == HOST:
            return self.pinned(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device=torch.device(self.kind, where))

    def place(self, module: Any, index: int) -> Any:
        module = module.to(torch.device(self.kind, index))
        self.current(index).synchronize()  # it was copied on the caller's stream and will be read on others
        return module


@cache
def torch_backend(kind: str) -> TorchBackend:
    """The one backend of ``kind`` in this process: what is broken or pooled is so for everybody."""
    return TorchBackend(kind)
