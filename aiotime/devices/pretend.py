"""A pretended accelerator: streams that run late and in any order, on the host. For tests without a GPU.

    backend = PretendBackend(2, choose=rng.randrange)          AcceleratorDevice("pretend", 0, backend=backend)
    queued operations ── step(): choose one of the streams whose head can run ──▶ done

It is made to catch the mistakes that corrupt data on a GPU without a word:

- Work runs as late as possible, and `choose` picks the stream, so that every missing wait between streams shows.
- Memory is handed out as a caching allocator does: what is freed is taken by the next allocation on the
  stream it was allocated on, at once, whoever still reads it. Reading or writing memory that has another owner by
  then is a violation.
- A pinned copy target holds `POISON` until its copy has run; refilling a pinned buffer that a queued copy still
  reads is a violation.
- A copy between devices runs on the source's current stream with a barrier on both sides, as PyTorch does it.
- Captures are voided as CUDA voids them (`aiotime.devices.pretend_captures`); what another thread queues on a capturing
  stream lands in the graph, which is a violation.

Arrays on a device are `PretendArray`: they know ``+``, ``*`` and `apply`.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from aiotime.devices.backend import HOST, NOWHERE
from aiotime.devices.pretend_captures import Captures, PretendGraph, Refused

if TYPE_CHECKING:
    from aiotime.devices.accelerator import Accelerator

POISON = -99

Operation = tuple[Callable[[], bool] | None, Callable[[], None]]  # can it run? (None: yes), what it does


def first(count: int) -> int:
    """The stream that was made first."""
    return 0


class PretendStream:
    """A queue of operations on device ``index``."""

    def __init__(self, backend: PretendBackend, index: int) -> None:
        self.backend = backend
        self.index = index
        self.queue: deque[Operation] = deque()
        self.free: list[Block] = []  # memory allocated on this stream and given back

    def push(self, effect: Callable[[], None], ready: Callable[[], bool] | None = None) -> None:
        self.backend.check()
        with self.backend.lock:
            capture = self.backend.captures.on(self)
            (self.queue if capture is None else capture.operations).append((ready, effect))
            if capture is not None and capture.thread != threading.get_ident():
                self.backend.violations.append("another thread's work landed in a graph")

    def record_event(self, event: PretendEvent) -> PretendEvent:
        with self.backend.lock:
            event.recorded += 1
            self.push(event.passer(event.recorded))
        return event

    def wait_event(self, event: PretendEvent) -> None:
        with self.backend.lock:
            awaited = event.recorded  # the newest record as of now; a later one is another matter
            self.push(_nothing, lambda: event.reached >= awaited)

    def synchronize(self) -> None:
        self.backend.captures.wait_for_stream(self)
        self.backend.run_until(lambda: not self.queue)


class PretendEvent:
    """Passed once the device has run its newest record."""

    def __init__(self, backend: PretendBackend) -> None:
        self.backend = backend
        self.recorded = self.reached = 0
        self.milliseconds = 0.0

    def passer(self, number: int) -> Callable[[], None]:
        def effect() -> None:
            self.reached = max(self.reached, number)
            self.milliseconds = self.backend.milliseconds

        return effect

    def query(self) -> bool:
        self.backend.check()
        self.backend.captures.ask_event()
        if self.reached < self.recorded:
            for _ in range(self.backend.steps_per_query):
                self.backend.step()
        self.backend.check()
        return self.reached >= self.recorded

    def synchronize(self) -> None:
        self.backend.captures.ask_event()
        self.backend.run_until(lambda: self.reached >= self.recorded)

    def elapsed_time(self, end: PretendEvent) -> float:
        return end.milliseconds - self.milliseconds


class Block:
    """Device memory. Its users are numbered: each allocation makes a new owner."""

    def __init__(self) -> None:
        self.owner = 0
        self.written = 0  # the owner that wrote its content
        self.content: torch.Tensor | None = None


class PretendArray:
    """An array on a pretended device: what it holds is known when the device gets there."""

    __slots__ = ("__weakref__", "_backend", "_block", "_owner", "_stream", "index", "like")

    def __init__(self, stream: PretendStream, like: torch.Tensor) -> None:
        self._backend = stream.backend
        self._stream = stream
        self.index = stream.index
        self.like = like.detach().to("meta")
        self._block = stream.free.pop() if stream.free else Block()
        self._block.owner += 1
        self._owner = self._block.owner

    def __del__(self) -> None:
        self._stream.free.append(self._block)  # at once: the allocator knows of no other stream

    def apply(self, fn: Callable[..., torch.Tensor], *others: PretendArray) -> PretendArray:
        """``fn`` of this array and ``others``, on the current stream."""
        stream = self._backend.current(self.index)
        result = PretendArray(stream, fn(self.like, *(other.like for other in others)))
        reads, write = [self.reader(), *(other.reader() for other in others)], result.writer()
        stream.push(lambda: write(fn(*(read() for read in reads))))
        return result

    def __add__(self, other: PretendArray | float) -> PretendArray:
        if isinstance(other, PretendArray):
            return self.apply(torch.add, other)
        return self.apply(lambda x: x + other)

    def __mul__(self, other: PretendArray | float) -> PretendArray:
        if isinstance(other, PretendArray):
            return self.apply(torch.mul, other)
        return self.apply(lambda x: x * other)

    @property
    def there(self) -> bool:
        """Has the device written it?"""
        return self._block.written == self._owner

    def break_device(self) -> PretendArray:
        """Queue an operation that the device does not survive."""
        backend = self._backend

        def fail(x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "meta":
                backend.dead = True
            return x

        return self.apply(fail)

    def reader(self) -> Callable[[], torch.Tensor]:
        """Reads what it holds when called; keeps the block, not the array, so that it may be freed before."""
        block, owner, like, backend = self._block, self._owner, self.like, self._backend

        def read() -> torch.Tensor:
            backend.milliseconds += 1.0
            if block.written != owner or block.content is None:
                backend.violations.append("device memory was read that had not been written, or was another's by then")
                return torch.full(like.shape, POISON, dtype=like.dtype)
            return block.content

        return read

    def writer(self) -> Callable[[torch.Tensor], None]:
        """Writes it when called."""
        block, owner, backend = self._block, self._owner, self._backend

        def write(content: torch.Tensor) -> None:
            if block.written > owner:
                backend.violations.append("device memory was written that was another's by then")
            block.written, block.content = owner, content.clone()

        return write


class PretendBackend:
    """The runtime of ``count`` pretended devices; an `aiotime.devices.backend.Backend`.

    Args:
        choose: n -> which of n streams runs its head next.
        steps_per_query: operations that the devices get done while somebody asks an event.

    Attributes:
        violations: what would have corrupted data; empty at the end of a correct program.
    """

    kind = "pretend"

    def __init__(self, count: int = 1, *, choose: Callable[[int], int] = first, steps_per_query: int = 0) -> None:
        self.accelerators: dict[int, Accelerator] = {}
        self.choose = choose
        self.steps_per_query = steps_per_query
        self.violations: list[str] = []
        self.milliseconds = 0.0  # one per array read
        self.dead = False
        self.lock = threading.RLock()
        self.events = 0  # made so far
        self.streams: list[PretendStream] = []
        self.captures = Captures()
        self._defaults = [self.new_stream(index) for index in range(count)]
        self._thread = threading.local()
        self._pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no address comes twice
        self._reading: Counter[int] = Counter()  # queued copies out of pinned memory, by address
        self._going = threading.Event()
        self._going.set()

    # ------------------------------------------------------------------ the device's side

    def step(self) -> bool:
        """Run one operation; False when none can run."""
        with self.lock:
            able = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0]())]
            if not able or self.dead or not self._going.is_set():
                return False
            _, effect = able[self.choose(len(able))].queue.popleft()
            with torch.inference_mode():  # the device knows no modes
                effect()
            return True

    def finish(self) -> None:
        """Run everything that can run."""
        while self.step():
            pass

    def run_until(self, done: Callable[[], bool]) -> None:
        """What a blocking wait does: the devices go on until ``done``; a wait for nothing is an error."""
        while True:
            self._going.wait()
            with self.lock:
                self.check()
                if done():
                    return
                if not self.step() and self._going.is_set() and not self.dead:
                    raise AssertionError("the devices wait for each other, or for what was never queued")

    def hold(self) -> None:
        """The devices stand still until `go`; who waits for them blocks."""
        self._going.clear()

    def go(self) -> None:
        self._going.set()

    def check(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (pretended)")

    # ------------------------------------------------------------------ the runtime

    def count(self) -> int:
        return len(self._defaults)

    def absence(self) -> str:
        return "none is pretended"

    def describe(self, index: int) -> str:
        return "Imagined Model 1"

    def new_stream(self, index: int, *, shared: bool = True) -> PretendStream:
        with self.lock:
            stream = PretendStream(self, index)
            self.streams.append(stream)
            return stream

    def new_event(self, *, timing: bool = False) -> PretendEvent:
        self.events += 1
        return PretendEvent(self)

    def current(self, index: int) -> PretendStream:
        """The calling thread's current stream of device ``index``."""
        current: PretendStream = getattr(self._thread, "current", {}).get(index, self._defaults[index])
        return current

    @contextmanager
    def on(self, *streams: Any) -> Iterator[None]:
        before = getattr(self._thread, "current", {})
        self._thread.current = {**before, **{stream.index: stream for stream in streams}}
        try:
            yield
        finally:
            self._thread.current = before

    def synchronize(self, index: int) -> None:
        self.captures.wait_for_device(index)
        self.run_until(lambda: not any(stream.queue for stream in self.streams if stream.index == index))

    def capture(
        self, call: Callable[[], Any], stream: PretendStream, *, mode: str = "thread_local"
    ) -> tuple[PretendGraph, Any]:
        with self.captures.record(stream, mode) as capture, self.on(stream):
            result = call()
        return PretendGraph(stream, capture.operations), result

    def forbidden(self, error: BaseException) -> bool:
        return isinstance(error, Refused)

    def where(self, leaf: Any) -> int:
        if isinstance(leaf, PretendArray):
            return leaf.index
        return HOST if isinstance(leaf, torch.Tensor) else NOWHERE

    def stageable(self, leaf: Any) -> bool:
        return True

    def is_pinned(self, leaf: Any) -> bool:
        return _address(leaf) in self._pinned

    def layout(self, leaf: Any) -> Hashable:
        return leaf.shape, leaf.dtype

    def nbytes(self, leaf: Any) -> int:
        return int(leaf.nbytes)

    def pinned(self, nbytes: int) -> Any:
        return self._pin(torch.zeros(nbytes, dtype=torch.uint8))

    def carve(self, buffer: Any, leaf: Any) -> Any:
        return buffer[: leaf.nbytes].view(leaf.dtype).view(leaf.shape)

    def fill(self, view: Any, leaf: Any) -> None:
        with self.lock:
            if self._reading[_address(view)]:
                self.violations.append("a pinned buffer was refilled before its copy had run")
            view.copy_(leaf)

    def send(self, leaf: Any, index: int) -> Any:
        target = self.current(index)
        if isinstance(leaf, PretendArray):
            return self._copy_across(leaf, target)
        result = PretendArray(target, leaf)
        write, address = result.writer(), _address(leaf)
        if address not in self._pinned:
            leaf = leaf.clone()  # the runtime stages pageable memory itself
        self._reading[address] += 1

        def effect() -> None:
            self._reading[address] -= 1
            self.milliseconds += 1.0
            write(leaf)

        target.push(effect)
        return result

    def _copy_across(self, leaf: PretendArray, target: PretendStream) -> PretendArray:
        source = self.current(leaf.index)
        result = PretendArray(target, leaf.like)
        read, write = leaf.reader(), result.writer()
        if source is not target:
            source.wait_event(target.record_event(self.new_event()))
        source.push(lambda: write(read()))
        if source is not target:
            target.wait_event(source.record_event(self.new_event()))
        return result

    def download(self, leaf: Any) -> Any:
        host = self._pin(torch.full(leaf.like.shape, POISON, dtype=leaf.like.dtype))
        read = leaf.reader()

        def effect() -> None:
            host.copy_(read())

        self.current(leaf.index).push(effect)
        return host

    def fetch(self, leaf: Any) -> Any:
        host = self.download(leaf)
        self.current(leaf.index).synchronize()
        return host

    def blank(self, nbytes: int, where: int) -> Any:
        host = self.pinned(nbytes)
        return host if where == HOST else self.send(host, where)

    def place(self, module: Any, index: int) -> Any:
        return module

    def _pin(self, buffer: torch.Tensor) -> torch.Tensor:
        self._pinned[_address(buffer)] = buffer
        return buffer


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _nothing() -> None:
    pass
