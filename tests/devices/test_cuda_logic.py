"""Accelerator streams and devices: everything about ``cuda:N`` that can be tested without a GPU."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from aiotime.batching.joining import Alike
from aiotime.devices import resolve
from aiotime.devices.accelerator import Accelerator
from aiotime.devices.backend import HOST, TorchBackend, torch_backend
from aiotime.devices.base import Completions, Pending, Work
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.cuda import AcceleratorDevice, AcceleratorStream, CudaDevice
from aiotime.devices.lane import AHEAD
from aiotime.devices.links import LARGE, SMALL, line
from aiotime.devices.poller import Poller
from aiotime.devices.pretend import PretendBackend
from aiotime.errors import (
    BrokenError,
    ClosedError,
    ConfigurationError,
    DeadlineExceeded,
    FrameCancelled,
    StageError,
    StageTimeout,
)
from aiotime.frame import Frame
from aiotime.pipeline import Pipeline
from aiotime.stage import Stage

Settle = Callable[..., Awaitable[None]]


class Nobody:
    def settled(self, frame: Frame) -> None: ...


class Bench:
    """Stages on device streams, driven through the device contract alone; what the engine does, in little."""

    def __init__(self, *devices: Any, fn: Callable[[Any], Any], timeout: float | None = None, workers: int = 1) -> None:
        self.loop = asyncio.get_running_loop()
        self.completions = Completions(self.loop, self.completed)
        self.streams = [device.open(self.completions, workers=workers) for device in devices]
        self.works = []
        for k, stream in enumerate(self.streams):
            following = devices[k + 1] if k + 1 < len(devices) else None
            host_output = following is None or following.on_host
            self.works.append(
                Work(fn, stage=f"stage{k}", index=k, workers=workers, timeout=timeout, host_output=host_output)
            )
            stream.bind(self.works[k])
        self.frames = 0
        self.order: list[int] = []  # as they settled

    def launch(self, value: Any, **attributes: Any) -> asyncio.Future[Any]:
        """Send one frame through all stages; its outcome."""
        frame = Frame(Nobody(), self.frames, Pending(value, done=True), 0.0)
        for name, attribute in attributes.items():
            setattr(frame, name, attribute)
        self.frames += 1
        frame.input = outcome = self.loop.create_future()
        for k, (work, stream) in enumerate(zip(self.works, self.streams, strict=True)):
            frame.tail = stream.launch(work, frame, last=k == len(self.works) - 1)
        for stream in self.streams:
            stream.ring()
        return outcome

    def exclusive(self, action: Callable[[], None]) -> asyncio.Future[Any]:
        frame = Frame(Nobody(), -1, Pending(None, done=True), 0.0)
        frame.input = outcome = self.loop.create_future()
        frame.tail = self.streams[0].exclusive(self.works[0], action, frame, last=True)
        self.streams[0].ring()
        return outcome

    def completed(self, pending: Pending) -> None:
        frame = pending.frame
        assert frame is not None

        def passed(error: BaseException | None) -> None:
            self.order.append(frame.index)
            if error is not None:
                frame.input.set_exception(error)
            else:
                frame.input.set_result(pending.value)

        if pending.event is None or pending.error is not None:
            passed(pending.error)
        else:
            Poller.of(self.loop).watch(pending.event, passed)

    async def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for stream in self.streams:
            await stream.join()


def pretend(count: int = 1, **options: Any) -> tuple[PretendBackend, list[AcceleratorDevice]]:
    """A pretended runtime whose devices get on while they are asked, and its devices."""
    options.setdefault("steps_per_query", 2)
    backend = PretendBackend(count, **options)
    return backend, [AcceleratorDevice("pretend", index, backend=backend) for index in range(count)]


def double(x: Any) -> Any:
    """Work for a host and for a device."""
    return x * 2 + 1


def outcome(future: asyncio.Future[Any]) -> Any:
    """The error or the result."""
    return future.exception() or future.result()


# ---------------------------------------------------------------------- streams


@pytest.mark.asyncio
@pytest.mark.parametrize("layout", [[0], [0, 0], [0, 1], [1, 0, 0]], ids=str)
async def test_frames_come_out_in_order_and_right(layout: list[int]) -> None:
    """Through one stage and several, on one device and two, whatever order the device's streams run in."""
    backend, devices = pretend(2, choose=random.Random(7).randrange)
    bench = Bench(*(devices[index] for index in layout), fn=double)
    futures = [bench.launch(torch.full((3,), float(i))) for i in range(40)]
    expected = [torch.full((3,), float(i)) for i in range(40)]
    for _ in layout:
        expected = [double(x) for x in expected]
    answers = await asyncio.gather(*futures)
    await bench.close()
    assert all(torch.equal(a, e) for a, e in zip(answers, expected, strict=True))
    assert backend.violations == []


@pytest.mark.asyncio
async def test_host_and_device_stages_alternate() -> None:
    """Cpu -> device -> cpu -> device: each reader waits where its memory is."""
    backend, (device,) = pretend()
    cpu = CpuDevice(0)
    bench = Bench(cpu, device, cpu, device, fn=double)
    answers = await asyncio.gather(*[bench.launch(torch.full((2,), float(i))) for i in range(30)])
    await bench.close()
    assert [a.tolist() for a in answers] == [[16.0 * i + 15] * 2 for i in range(30)]
    assert backend.violations == []


@pytest.mark.asyncio
async def test_the_loop_goes_on_while_the_device_works(settle: Settle) -> None:
    """With the device standing still, launches return, the loop turns, and no frame is settled."""
    backend, (device,) = pretend()
    bench = Bench(device, fn=double)
    backend.hold()
    futures = [bench.launch(torch.ones(2)) for _ in range(20)]
    await settle(200)
    assert not any(future.done() for future in futures)
    backend.go()
    assert [a.tolist() for a in await asyncio.gather(*futures)] == [[3, 3]] * 20
    await bench.close()


@pytest.mark.asyncio
async def test_a_launcher_that_sleeps_has_announced_what_it_launched(settle: Settle) -> None:
    """With the device standing still, the frames launched before it fell asleep are known to the loop."""
    backend, (device,) = pretend()
    bench = Bench(device, fn=double)
    bench.streams[0].patience = 60.0  # seconds that announcements may wait for company; nobody pulses here
    assert (await bench.launch(torch.ones(1))).tolist() == [3]  # the lane is there
    known: list[int] = []
    completed = bench.completed

    def counted(pending: Pending) -> None:
        assert pending.frame is not None
        known.append(pending.frame.index)
        completed(pending)

    bench.completions._handle = counted
    backend.hold()
    futures = [bench.launch(torch.ones(1)) for _ in range(AHEAD + 2)]
    try:
        await settle(until=lambda: len(known) == AHEAD)
    finally:
        backend.go()
    assert [a.tolist() for a in await asyncio.gather(*futures)] == [[3]] * (AHEAD + 2)
    await bench.close()


@pytest.mark.asyncio
async def test_several_launchers_share_a_stage() -> None:
    """With workers=3 each has streams of its own; every frame gets its own answer."""
    backend, (device,) = pretend(choose=random.Random(3).randrange)
    bench = Bench(device, fn=double, workers=3)
    answers = await asyncio.gather(*[bench.launch(torch.full((2,), float(i))) for i in range(60)])
    await bench.close()
    assert [a.tolist() for a in answers] == [[2.0 * i + 1] * 2 for i in range(60)]
    assert backend.violations == []


@pytest.mark.asyncio
async def test_cancelled_and_expired_frames_are_passed_over() -> None:
    """They are not computed, their neighbours are, and the order is kept."""
    _, (device,) = pretend()
    calls = []

    def fn(x: Any) -> Any:
        calls.append(1)
        return double(x)

    bench = Bench(device, fn=fn)
    futures = [
        bench.launch(torch.ones(1)),
        bench.launch(torch.ones(1), cancelled=True),
        bench.launch(torch.ones(1), deadline=0.0),
        bench.launch(torch.ones(1)),
    ]
    await asyncio.wait(futures)
    await bench.close()
    assert [type(outcome(future)) for future in futures] == [
        torch.Tensor,
        FrameCancelled,
        DeadlineExceeded,
        torch.Tensor,
    ]
    assert len(calls) == 2


@pytest.mark.asyncio
async def test_an_error_passes_down_as_a_value() -> None:
    """A frame that failed upstream is not computed downstream; it says stage and frame."""
    backend, devices = pretend(2)

    def fn(x: Any) -> Any:
        if x.like.shape == (2,):
            raise MemoryError("out of memory")
        return double(x)

    bench = Bench(*devices, fn=fn)
    futures = [bench.launch(torch.ones(n)) for n in (1, 2, 3)]
    await asyncio.wait(futures)
    await bench.close()
    error = outcome(futures[1])
    assert isinstance(error, StageError)
    assert (error.stage, error.frame) == ("stage0", 1)
    assert isinstance(error.__cause__, MemoryError)
    assert outcome(futures[2]).tolist() == [7] * 3
    assert bench.works[1].recorders[0].passed == 1
    assert backend.violations == []


@pytest.mark.asyncio
async def test_a_lost_device_ends_everything_that_needs_it() -> None:
    """The frame that broke it, those under way and those after it get a BrokenError; nothing hangs."""
    backend, (device,) = pretend()

    def fn(x: Any) -> Any:
        return x.break_device() if x.like.shape == (2,) else double(x)

    bench = Bench(device, fn=fn)
    futures = [bench.launch(torch.ones(n)) for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    await asyncio.wait(futures)
    assert {type(outcome(future)) for future in futures[1:]} == {BrokenError}
    outcome(futures[0])  # it may have come out before
    await bench.close()
    with pytest.raises(BrokenError, match="restart the process"):
        device.open(bench.completions)
    with pytest.raises(BrokenError):
        AcceleratorDevice("pretend", 0, backend=backend).open(bench.completions)


@pytest.mark.asyncio
async def test_a_control_action_runs_alone() -> None:
    """The device has finished everything before it, and nothing launched later has begun."""
    backend, (device,) = pretend()
    scale, seen = [2.0], []

    def swap() -> None:
        seen.append([len(stream.queue) for stream in backend.streams])
        scale[0] = 10.0

    for workers in (1, 3):
        scale[0] = 2.0
        bench = Bench(device, fn=lambda x: x * scale[0], workers=workers)
        before = [bench.launch(torch.ones(1)) for _ in range(7)]
        swapped = bench.exclusive(swap)
        after = [bench.launch(torch.ones(1)) for _ in range(7)]
        answers = await asyncio.gather(*before, *after)
        assert await swapped is None
        await bench.close()
        assert [a.item() for a in answers] == [2.0] * 7 + [10.0] * 7
    assert not any(any(lengths) for lengths in seen)
    assert len(seen) == 2


@pytest.mark.asyncio
async def test_what_an_action_leaves_on_the_device_is_done_before_the_next_frame() -> None:
    """New weights are made on the launcher's stream and there before any launcher goes on."""
    backend, (device,) = pretend(choose=lambda n: n - 1)
    weights: list[Any] = [backend.send(torch.ones(1), 0)]
    backend.finish()
    default, seen = backend.current(0), []

    def swap() -> None:
        assert backend.current(0) is not default
        weights[0] = backend.send(torch.full((1,), 5.0), 0) + 1

    def fn(x: Any) -> Any:
        seen.append(weights[0].there)
        return x * weights[0]

    bench = Bench(device, fn=fn, workers=2)
    before = [bench.launch(torch.ones(1)) for _ in range(4)]
    done = bench.exclusive(swap)
    after = [bench.launch(torch.ones(1)) for _ in range(4)]
    answers = await asyncio.gather(*before, *after)
    await done
    await bench.close()
    assert [a.item() for a in answers] == [1.0] * 4 + [6.0] * 4
    assert seen == [True] * 8
    assert backend.violations == []


@pytest.mark.asyncio
async def test_a_launch_that_hangs_is_given_up(settle: Settle) -> None:
    """Its frame fails after the stage's timeout, another launcher with streams of its own takes over."""
    _, (device,) = pretend()
    gate, inside = threading.Event(), threading.Event()

    def fn(x: Any) -> Any:
        if x.like.shape == (2,):
            inside.set()
            gate.wait()
        return double(x)

    bench = Bench(device, fn=fn, timeout=5.0)
    stuck, fine = bench.launch(torch.ones(2)), bench.launch(torch.ones(1))
    await settle(until=inside.is_set)
    bench.streams[0].pulse(float("inf"))
    with pytest.raises(StageTimeout):
        await stuck
    assert (await fine).tolist() == [3]
    gate.set()
    await bench.close()


@pytest.mark.asyncio
async def test_closing_finishes_what_was_queued() -> None:
    """What was launched before close() comes out, what is launched after it is refused, and every thread ends."""
    backend, (device,) = pretend()
    bench = Bench(device, fn=double)
    futures = [bench.launch(torch.ones(1)) for _ in range(10)]
    threads = [w.thread for w in bench.streams[0]._crew]
    await bench.close()
    refused = bench.launch(torch.ones(1))
    await bench.close()
    assert [(await future).tolist() for future in futures] == [[3]] * 10
    with pytest.raises(ClosedError):
        await refused
    assert not any(thread is not None and thread.is_alive() for thread in threads)
    assert Poller.of(asyncio.get_running_loop()).waiting == 0
    streams, again = len(backend.streams), Bench(device, fn=double)
    assert (await again.launch(torch.ones(1))).tolist() == [3]
    await again.close()
    assert len(backend.streams) == streams  # it found the streams of the one before


@pytest.mark.asyncio
async def test_a_stream_that_was_never_used_closes(settle: Settle) -> None:
    """No job, no lane, nothing to wait for."""
    _, (device,) = pretend()
    bench = Bench(device, fn=double)
    await bench.close()


@pytest.mark.asyncio
async def test_a_settled_frame_leaves_nothing_behind(settle: Settle) -> None:
    """Once its result is out nothing holds its input: not a mark, not a launcher, not the poller."""
    _, (device,) = pretend()
    bench = Bench(device, device, fn=double)
    payload = torch.ones(1)
    gone = weakref.ref(payload)
    result = bench.launch(payload)
    del payload
    await result
    del result
    await settle(until=lambda: gone() is None)
    await bench.close()


# ---------------------------------------------------------------------- pipelines


@pytest.mark.asyncio
async def test_a_pipeline_runs_on_it() -> None:
    """Stages on two devices and the host, built from functions, in order and right."""
    backend, (one, two) = pretend(2, choose=random.Random(11).randrange)
    pipeline = Pipeline.from_stages(
        [
            Stage(lambda x: x + 1, device="cpu:0", name="decode"),
            Stage(double, device=one, name="first"),
            Stage(double, device=one, name="second"),
            Stage(double, device=two, name="third"),
            Stage(lambda x: x.sum().item(), device="cpu:1", name="count"),
        ]
    )
    outputs = [p.output async for p in pipeline.run(torch.full((2,), float(i)) for i in range(50))]
    assert outputs == [2 * (8.0 * (i + 1) + 7) for i in range(50)]
    assert backend.violations == []


@pytest.mark.asyncio
async def test_a_pipeline_ends_when_its_device_is_lost() -> None:
    """The run raises BrokenError instead of skipping for ever."""
    _, (device,) = pretend()

    def fn(x: Any) -> Any:
        return x.break_device() if x.like.shape == (3,) else double(x)

    pipeline = Pipeline.from_stages([Stage(fn, device=device, name="model")])
    with pytest.raises(BrokenError, match="pretend:0 failed"):
        async for _ in pipeline.run((torch.ones(i + 1) for i in range(50)), on_error="skip"):
            pass


# ---------------------------------------------------------------------- devices


def test_no_gpu_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a GPU where there is none says why there is none and what to write instead."""
    monkeypatch.setattr(TorchBackend, "count", lambda self: 0)
    with pytest.raises(ConfigurationError, match=r'device "cuda:0" cannot be used: .*devices=\["cpu:0"'):
        resolve("cuda:0")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        CudaDevice()


def test_a_gpu_too_many_is_said_with_those_there_are() -> None:
    """The message lists what there is, by name and model."""
    backend, _ = pretend(2)
    with pytest.raises(ConfigurationError, match=r'no device "pretend:2"; there is "pretend:0" .Imagined Model 1., "'):
        AcceleratorDevice("pretend", 2, backend=backend)


def test_a_kind_that_pytorch_does_not_know_is_refused() -> None:
    """It is PyTorch that knows the kinds."""
    for kind in ("abacus", "cpu", "mps"):
        with pytest.raises(ConfigurationError, match=f"no accelerator called '{kind}'"):
            AcceleratorDevice(kind)


def test_a_device_describes_itself() -> None:
    """Not on the host, a stream per stage, and equal models share a speed class."""
    backend, (one, two) = pretend(2)
    assert (one.name, one.on_host, one.shares_stream, one.may_sleep) == ("pretend:0", False, False, True)
    assert one.speed_class == two.speed_class
    assert Accelerator.of(backend, 0) is Accelerator.of(backend, 0)
    assert isinstance(one.place(torch.nn.Linear(1, 1)), torch.nn.Linear)


def test_measuring_counts_device_time() -> None:
    """Every call reads three arrays, one pretended millisecond each; the result is left on the device."""
    backend, (device,) = pretend()
    seconds, result = device.measure(lambda x: x * 2 + (x + 1), torch.ones(2), seconds=0.0)
    assert seconds == pytest.approx(4e-3)
    assert backend.where(result) == 0
    again, _ = device.measure(double, result, seconds=0.0)
    assert again == pytest.approx(2e-3)
    assert backend.violations == []


def test_transfers_are_measured_once_per_pair() -> None:
    """Host and peer links, either way round; nothing within a device."""
    backend, (one, two) = pretend(2)
    cpu = CpuDevice(0)
    assert one.transfer_seconds(1000, one) == 0.0
    assert one.transfer_seconds(1000, cpu) == pytest.approx(1e-3)
    assert cpu.transfer_seconds(1000, one) == pytest.approx(1e-3)
    assert one.transfer_seconds(1000, two) == pytest.approx(1e-3)
    spent = backend.milliseconds
    assert one.transfer_seconds(10**6, cpu) == pytest.approx(1e-3)
    assert backend.milliseconds == spent
    assert set(Accelerator.of(backend, 0).links) == {HOST, 1}


def test_a_transfer_between_runtimes_goes_through_the_host() -> None:
    """Two kinds of accelerators have no link of their own."""
    _, (one,) = pretend()
    _, (other,) = pretend()
    assert one.transfer_seconds(1000, other) == pytest.approx(2e-3)


def test_a_line_through_two_measurements() -> None:
    """Latency and slope; noise makes neither negative."""
    latency, per_byte = line((SMALL, 1e-5 + SMALL * 1e-10), (LARGE, 1e-5 + LARGE * 1e-10))
    assert latency == pytest.approx(1e-5)
    assert per_byte == pytest.approx(1e-10)
    assert line((10, 2.0), (20, 1.0)) == (2.0, 0.0)
    assert line((10, 1.0), (20, 3.0)) == (0.0, 0.2)


def test_torchs_backend_is_one_per_kind() -> None:
    """What is pooled or lost is so for everybody in the process."""
    assert torch_backend("cuda") is torch_backend("cuda")


def test_torchs_backend_carves_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of a byte buffer has the array's dtype, shape and (dense) strides; what is not dense becomes so."""
    backend = torch_backend("cuda")
    arrays = [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(6).view(2, 3).t(),
        torch.ones(3, 1).expand(3, 4),
        torch.arange(10.0)[::2],
        torch.tensor(3, dtype=torch.int8),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64) * 1j,
        torch.ones(0, 3),
        torch.ones(2, requires_grad=True),
        torch.ones(4, dtype=torch.complex64).conj(),
    ]
    buffer = torch.empty(4096, dtype=torch.uint8)
    for mode in (True, False):
        with torch.inference_mode(mode=mode):
            for array in arrays:
                assert backend.where(array) == HOST
                assert backend.stageable(array)
                view = backend.carve(buffer, array)
                backend.fill(view, array)
                assert torch.equal(view, array)
                assert view.dtype == array.dtype
                assert view.stride() == torch.empty_like(array).stride()
                assert not view.requires_grad
                assert backend.nbytes(array) == array.numel() * array.element_size()
    assert backend.layout(arrays[0]) != backend.layout(arrays[1])
    assert not backend.stageable(torch.eye(3).to_sparse())


def test_the_streams_name_is_its_label() -> None:
    """As threads and lanes of a trace show it."""
    loop = asyncio.new_event_loop()
    _, (device,) = pretend()
    stream = device.open(Completions(loop, lambda pending: None), label="model@pretend:0")
    assert isinstance(stream, AcceleratorStream)
    assert stream.name == "model@pretend:0"
    loop.close()


@pytest.mark.asyncio
async def test_frames_share_a_job_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is joined on the host, copied and launched once, and divided behind its one copy back."""
    monkeypatch.setattr(Alike, "check", lambda self, output, sizes: None)  # pretended arrays are no tensors
    backend = PretendBackend(1)
    launches: list[int] = []

    def fn(x: Any) -> Any:
        launches.append(x.like.shape[0])
        return x * 2 + 1

    stage = Stage(fn, device=AcceleratorDevice("pretend", backend=backend), max_batch=4, max_wait=0.001)
    async with Pipeline.from_stages([stage], depth=8) as pipeline:
        outputs = [pred.output async for pred in pipeline.run([torch.full((1, 2), float(i)) for i in range(16)])]
    assert all(torch.equal(output, torch.full((1, 2), 2.0 * i + 1)) for i, output in enumerate(outputs))
    assert sum(launches) == 16
    assert max(launches) > 1
    assert backend.violations == []
