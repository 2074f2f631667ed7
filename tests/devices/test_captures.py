"""Graph captures beside everything else that uses a device: nobody voids one, nobody takes one for a lost device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from aiotime.compiling.graph import CudaRecorder
from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import FORBIDDEN, torch_backend
from aiotime.devices.base import Completions, Pending, Work
from aiotime.devices.cuda import AcceleratorDevice
from aiotime.devices.lane import Lane
from aiotime.devices.pretend import PretendBackend
from aiotime.devices.pretend_captures import Refused
from aiotime.devices.staging import Ring
from aiotime.errors import BrokenError
from aiotime.frame import Frame


@contextmanager
def thread(act: Callable[[], None]) -> Iterator[None]:
    """Another thread does ``act`` meanwhile, and is waited for; what it raises is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=run)
    other.start()
    try:
        yield
    finally:
        other.join(20)
    assert not other.is_alive()
    if failures:
        raise failures[0]


class Noting(PretendBackend):
    """Says when somebody was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = threading.Event()

    def forbidden(self, error: BaseException) -> bool:
        self.refused.set()
        return super().forbidden(error)


class Turnstile:
    """A lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.waited = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited.set()
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def turnstile(accelerator: Accelerator) -> threading.Event:
    """Set once somebody waits for the lock of captures."""
    lock = Turnstile()
    accelerator.quiet = lock  # type: ignore[assignment]
    return lock.waited


@contextmanager
def users_capture(backend: PretendBackend, mode: str = "global") -> Iterator[Callable[[], None]]:
    """User code captures on another thread, as ``torch.cuda.graph`` does by default; call what it gives to end that."""
    begun, over = threading.Event(), threading.Event()
    stream = backend.new_stream(0)

    def capture() -> None:
        def body() -> None:
            begun.set()
            assert over.wait(20)

        try:
            backend.capture(body, stream, mode=mode)
        except Refused:
            pass  # its own affair

    with thread(capture):
        assert begun.wait(20)
        try:
            yield over.set
        finally:
            over.set()


def launched(lane: Lane) -> Pending:
    """One job, on its way."""
    mine = Pending()
    lane.run(lambda x: x * 2 + 1, Pending(torch.ones(2), done=True), mine, host_output=True)
    return mine


# ---------------------------------------------------------------------- what a graph is


def test_a_graph_computes_again_what_was_captured() -> None:
    """Nothing runs during the capture; each replay runs in order on the stream it is queued on."""
    backend = PretendBackend()
    accelerator = Accelerator.of(backend, 0)
    static = backend.send(torch.ones(2), 0)
    backend.finish()
    graph, output = accelerator.capture(lambda: static * 3, accelerator.borrow("capture"))
    backend.finish()
    assert not output.there
    for _ in range(2):
        graph.replay()
        host = backend.download(output)
        backend.finish()
        assert host.tolist() == [3, 3]
    assert backend.violations == []


def test_frames_go_on_during_a_capture() -> None:
    """Lanes launch and their results are waited for; none of it lands in the graph, and the capture holds."""
    backend = PretendBackend()
    accelerator = Accelerator.of(backend, 0)
    lane = Lane(accelerator)
    seen: list[Any] = []

    def frame() -> None:
        mine = launched(lane)
        assert mine.event is not None
        mine.event.synchronize()
        seen.append(mine.value.tolist())

    def body() -> None:
        with thread(frame):
            pass

    accelerator.capture(body, accelerator.borrow("capture"))
    assert seen == [[3, 3]]
    lane.close()
    assert backend.violations == []


def test_what_others_launch_into_a_capture_is_noticed() -> None:
    """The pretended device tells of the mistake that a GPU makes silently."""
    backend = PretendBackend()
    stream = backend.new_stream(0)

    def other() -> None:
        with backend.on(stream):
            backend.send(torch.ones(1), 0)

    def body() -> None:
        with thread(other):
            pass

    backend.capture(body, stream)
    assert backend.violations == ["another thread's work landed in a graph"]


def test_waiting_for_the_device_voids_a_capture_in_every_mode() -> None:
    """As on a GPU: who waits is refused, and the capture fails when it ends; another device does not matter."""
    backend = PretendBackend(2)
    for mode in ("global", "thread_local", "relaxed"):
        stream = backend.new_stream(0)

        def waits() -> None:
            backend.synchronize(1)
            with pytest.raises(Refused):
                backend.synchronize(0)

        def body() -> None:
            with thread(waits):
                pass

        with pytest.raises(Refused, match="previous error during capture"):
            backend.capture(body, stream, mode=mode)


# ---------------------------------------------------------------------- nobody of ours voids one


def test_waiting_for_the_device_waits_for_the_capture() -> None:
    """`settle` begins when the capture has ended."""
    backend = PretendBackend()
    accelerator = Accelerator.of(backend, 0)
    order: list[str] = []
    waited = turnstile(accelerator)

    def settle() -> None:
        accelerator.settle()
        order.append("settled")

    other = threading.Thread(target=settle)

    def body() -> None:
        other.start()
        assert waited.wait(20)
        order.append("captured")

    accelerator.capture(body, accelerator.borrow("capture"))
    other.join(20)
    assert order == ["captured", "settled"]


@pytest.mark.asyncio
async def test_a_refresh_is_not_voided_by_another_stages_actions_or_first_frame() -> None:
    """A second stage opens its lane, and swaps its weights, while the first one captures: all three succeed."""
    backend = PretendBackend(steps_per_query=2)
    waited = turnstile(Accelerator.of(backend, 0))
    device = AcceleratorDevice("pretend", backend=backend)
    loop = asyncio.get_running_loop()
    outcomes: list[BaseException | None] = []
    done = asyncio.Event()

    def completed(pending: Pending) -> None:
        outcomes.append(pending.error)
        if len(outcomes) == 3:
            done.set()

    completions = Completions(loop, completed)
    streams = [device.open(completions, label=label) for label in ("one", "two")]
    works = [Work(lambda x: x * 2, stage=label, index=0) for label in ("one", "two")]
    for stream, work in zip(streams, works, strict=True):
        stream.bind(work)
    recorder = CudaRecorder(Accelerator.of(backend, 0))
    static, calls = backend.send(torch.ones(1), 0), [0]
    backend.finish()

    def call() -> Any:
        calls[0] += 1
        if calls[0] > 3:  # the ones before were to warm up
            loop.call_soon_threadsafe(meanwhile)
            assert waited.wait(20)  # the other launcher has got as far as it can
        return static * 2

    def refresh() -> None:
        recorder.capture(call)

    class Nobody:
        def settled(self, frame: Frame) -> None: ...

    def frame(value: Any) -> Frame:
        return Frame(Nobody(), 0, Pending(value, done=True), 0.0)

    def meanwhile() -> None:
        streams[1].launch(works[1], frame(torch.ones(1)), last=True)
        streams[1].exclusive(works[1], lambda: None, frame(None), last=True)
        streams[1].ring()

    streams[0].exclusive(works[0], refresh, frame(None), last=True)
    streams[0].ring()
    await asyncio.wait_for(done.wait(), 20)
    assert outcomes == [None, None, None]
    for stream in streams:
        stream.close()
        await stream.join()
    assert backend.violations == []


def test_two_refreshes_do_not_void_each_other() -> None:
    """Two stages that capture at the same moment both get their graph, on a stream of its own."""
    backend = PretendBackend()
    accelerator = Accelerator.of(backend, 0)
    static = backend.send(torch.ones(1), 0)
    backend.finish()
    graphs: list[Any] = []
    together = threading.Barrier(2)

    def refresh() -> None:
        together.wait(20)
        graphs.append(CudaRecorder(accelerator).capture(lambda: static + 1))

    with thread(refresh), thread(refresh):
        pass
    for graph in graphs:
        graph.replay()
        host = backend.download(graph.output)
        backend.finish()
        assert host.tolist() == [2]
    streams = len(backend.streams)
    graphs.clear()
    del graph
    assert CudaRecorder(accelerator).capture(lambda: static + 1).replay is not None
    assert len(backend.streams) == streams  # the streams of graphs that are gone are used again


def test_measuring_a_link_and_placing_weights_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for its own streams, which no capture minds."""
    backend = PretendBackend(2)
    one, two = (AcceleratorDevice("pretend", index, backend=backend) for index in range(2))

    def never(index: int) -> None:
        raise AssertionError("waited for the whole device")

    monkeypatch.setattr(backend, "synchronize", never)
    assert one.transfer_seconds(1000, two) > 0
    one.place(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------------- captures of user code


def test_a_users_capture_is_not_taken_for_a_lost_device() -> None:
    """Whoever asks hears "not yet", whoever waits waits on, and the frames come out."""
    backend = Noting()
    lane = Lane(Accelerator.of(backend, 0))
    mine = launched(lane)
    assert mine.event is not None
    with users_capture(backend) as end:
        assert not mine.event.query()
        backend.refused.clear()
        with thread(mine.event.synchronize):
            assert backend.refused.wait(20)
            end()
    assert mine.value.tolist() == [3, 3]
    assert not lane.accelerator.broken
    lane.close()


def test_a_ring_waits_for_a_users_capture() -> None:
    """Asking a slot's event is refused as any event's is."""
    backend = Noting()
    ring = Ring(Accelerator.of(backend, 0), slots=1)
    slot = ring.take()
    with users_capture(backend) as end:
        taken: list[Any] = []
        with thread(lambda: taken.append(ring.take())):
            assert backend.refused.wait(20)
            end()
    assert taken == [slot]
    ring.close()


def test_a_control_action_waits_for_a_users_capture() -> None:
    """Waiting for the whole device is tried again once the capture is over."""
    backend = Noting()
    accelerator = Accelerator.of(backend, 0)
    with users_capture(backend, "relaxed") as end, thread(accelerator.settle):
        assert backend.refused.wait(20)
        end()
    assert not accelerator.broken


def test_a_capture_that_never_ends_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever: after a while the refusal is told like any other failure."""
    monkeypatch.setattr("aiotime.devices.accelerator.LONGEST_CAPTURE", 0.0)
    backend = PretendBackend()
    lane = Lane(Accelerator.of(backend, 0))
    mine = launched(lane)
    assert mine.event is not None
    with users_capture(backend), pytest.raises(BrokenError, match="not permitted when stream is capturing"):
        mine.event.synchronize()
    lane.close()


def test_torchs_errors_are_told_apart() -> None:
    """By their code where PyTorch tells it, by their text where it does not."""
    backend = torch_backend("cuda")
    for code, said in FORBIDDEN.items():
        coded = RuntimeError("CUDA error")
        coded.error_code = code  # type: ignore[attr-defined]
        assert backend.forbidden(coded)
        assert backend.forbidden(RuntimeError(f"CUDA error: {said}\nCUDA kernel errors might be reported later"))
    lost = RuntimeError(f"CUDA error: an illegal memory access; once also {FORBIDDEN[900]}")
    lost.error_code = 700  # type: ignore[attr-defined]
    assert not backend.forbidden(lost)
    assert not backend.forbidden(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not backend.forbidden(ValueError(FORBIDDEN[900]))


# ---------------------------------------------------------------------- streams lent for a while


def test_a_measurement_that_fails_gives_its_stream_back() -> None:
    """The next one finds it, empty."""
    backend = PretendBackend()
    device = AcceleratorDevice("pretend", backend=backend)

    def fails(x: Any) -> Any:
        x * 2
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            device.measure(fails, torch.ones(1), seconds=0.0)
        assert len(backend.streams) == 2  # the default one and the lent one
        assert not any(stream.queue for stream in backend.streams)
