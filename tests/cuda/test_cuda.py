"""``cuda:N`` on a real GPU: answers, lifetimes under load, waiting, errors. Written without one; not yet run on a GPU.

`torch.cuda._sleep` keeps a stream busy for a number of cycles, so that what should wait is seen waiting and what is
freed too early is overwritten; nothing here asserts on a duration.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from aiotime.devices import Device, resolve
from aiotime.devices.base import Completions, Pending, Work
from aiotime.devices.cuda import CudaDevice
from aiotime.devices.marks import Mark
from aiotime.devices.poller import Poller
from aiotime.devices.staging import SLOTS
from aiotime.errors import StageError
from aiotime.frame import Frame
from aiotime.observe.meter import quantile
from aiotime.pipeline import Pipeline
from aiotime.stage import Stage

pytestmark = pytest.mark.cuda

Settle = Callable[..., Awaitable[None]]

LONG = 500_000_000  # cycles, a fraction of a second
SHORT = 200_000  # cycles, around 100 µs


class Nobody:
    def settled(self, frame: Frame) -> None: ...


class Bench:
    """Stages on device streams, driven through the device contract alone."""

    def __init__(
        self, devices: Sequence[str | Device], fns: Sequence[Callable[[Any], Any]], *, workers: int = 1
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.completions = Completions(self.loop, self.completed)
        found = [resolve(device) for device in devices]
        self.streams = [device.open(self.completions, workers=workers) for device in found]
        self.works = []
        for k, (fn, stream) in enumerate(zip(fns, self.streams, strict=True)):
            host_output = k + 1 == len(found) or found[k + 1].on_host
            self.works.append(Work(fn, stage=f"stage{k}", index=k, workers=workers, host_output=host_output))
            stream.bind(self.works[k])
        self.frames = 0

    def launch(self, value: Any) -> tuple[Pending, asyncio.Future[Any]]:
        frame = Frame(Nobody(), self.frames, Pending(value, done=True), 0.0)
        self.frames += 1
        frame.input = result = self.loop.create_future()
        for k, (work, stream) in enumerate(zip(self.works, self.streams, strict=True)):
            frame.tail = stream.launch(work, frame, last=k == len(self.works) - 1)
        for stream in self.streams:
            stream.ring()
        assert frame.tail is not None
        return frame.tail, result

    def completed(self, pending: Pending) -> None:
        frame = pending.frame
        assert frame is not None

        def passed(error: BaseException | None) -> None:
            if error is not None:
                frame.input.set_exception(error)
            else:
                frame.input.set_result(pending.value)

        if pending.event is None or pending.error is not None:
            passed(pending.error)
        else:
            Poller.of(self.loop).watch(pending.event, passed)

    async def answers(self, values: Sequence[Any], *, at_once: int = 16) -> list[Any]:
        """All results in order, with so many frames in flight."""
        results: list[asyncio.Future[Any]] = []
        for position, value in enumerate(values):
            if position >= at_once:
                await results[position - at_once]
            results.append(self.launch(value)[1])
        return list(await asyncio.gather(*results))

    async def close(self) -> None:
        for stream in self.streams:
            stream.close()
        for stream in self.streams:
            await stream.join()


def halves() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A small CNN in two parts, on the GPU."""
    torch.manual_seed(0)
    front = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU())
    back = torch.nn.Sequential(
        torch.nn.Conv2d(16, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(7200, 10)
    )
    device = CudaDevice()
    device.place(front.eval())
    device.place(back.eval())
    return front, back


def busy(x: Any, cycles: int = SHORT) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- answers


@pytest.mark.asyncio
@pytest.mark.parametrize("layout", ["one", "two", "between hosts"])
async def test_outputs_are_the_modules_own(layout: str) -> None:
    """One stage, two stages on one GPU, cpu -> cuda -> cuda -> cpu: what the module says, in order, on the host."""
    front, back = halves()
    frames = [torch.randn(1, 3, 32, 32) for _ in range(60)]
    with torch.inference_mode():
        expected = [back(front(frame.cuda())).cpu() for frame in frames]
    stages: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {
        "one": [("cuda:0", lambda x: back(front(x)))],
        "two": [("cuda:0", front), ("cuda:0", back)],
        "between hosts": [("cpu:0", lambda x: x), ("cuda:0", front), ("cuda:0", back), ("cpu:1", lambda x: x + 0)],
    }
    bench = Bench([device for device, _ in stages[layout]], [fn for _, fn in stages[layout]])
    answers = await bench.answers(frames)
    await bench.close()
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.device.type == "cpu"
        torch.testing.assert_close(answer, wanted)


@pytest.mark.asyncio
async def test_values_of_any_shape_and_structure_travel() -> None:
    """Dicts, tuples, odd dtypes, non-contiguous, empty and scalar tensors, and what is no tensor."""
    value: Any = {
        "a": torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        "b": (torch.tensor(7), torch.ones(0, 3), "text", None),
        "c": [
            torch.tensor([True, False]),
            torch.ones(3, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.complex64) * 1j,
        ],
        "d": torch.randn(1, 4, 5, 6).to(memory_format=torch.channels_last),
    }

    def on_gpu(v: Any) -> Any:
        assert v["a"].is_cuda
        assert v["d"].is_contiguous(memory_format=torch.channels_last)
        return v

    bench = Bench(["cuda:0", "cuda:0"], [on_gpu, on_gpu])
    (answer,) = await bench.answers([value])
    await bench.close()
    assert torch.equal(answer["a"], value["a"])
    assert answer["b"][2:] == ("text", None)
    assert answer["b"][0].item() == 7
    assert answer["b"][1].shape == (0, 3)
    for got, sent in zip(answer["c"], value["c"], strict=True):
        assert torch.equal(got, sent)
    assert torch.equal(answer["d"], value["d"])


@pytest.mark.asyncio
async def test_views_come_back_without_waiting(settle: Settle) -> None:
    """Slices, expanded and transposed outputs are whole, and their copies are queued like any other."""

    def work(x: Any) -> Any:
        busy(x, LONG)
        return x[::2, 1:], x[:1].expand(5, 8), x.t(), x.t()[1:, ::3]

    x = torch.arange(64.0).view(8, 8)
    bench = Bench(["cuda:0"], [work])
    await bench.answers([x])
    pending, result = bench.launch(x)
    await settle(until=lambda: pending.done)
    assert pending.event is not None
    assert not pending.event.query()
    for got, wanted in zip(await result, (x[::2, 1:], x[:1].expand(5, 8), x.t(), x.t()[1:, ::3]), strict=True):
        assert torch.equal(got, wanted)
    await bench.close()


@pytest.mark.asyncio
@pytest.mark.cuda(devices=2)
async def test_values_cross_between_gpus() -> None:
    """cuda:0 -> cuda:1 -> cuda:0 under load: each reads what the other wrote, when it was written."""

    def add(x: Any) -> Any:
        busy(x)
        return x + 1

    frames = [torch.full((1 << 18,), float(i)) for i in range(200)]
    bench = Bench(["cuda:0", "cuda:1", "cuda:0"], [add, add, add])
    answers = await bench.answers(frames)
    await bench.close()
    assert all((answer == i + 3).all() for i, answer in enumerate(answers))


# ---------------------------------------------------------------------- lifetimes


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 3])
async def test_no_memory_is_reused_across_streams_too_early(workers: int) -> None:
    """Busy streams, many temporaries, changing sizes: every element of every frame is exact."""

    def work(x: Any) -> Any:
        busy(x)
        scratch = [x * 0 + k for k in range(4)]  # blocks that come and go
        busy(x)
        return x + sum(scratch) - 6 + 1

    frames = [torch.full((1 << (10 + i % 9),), i) for i in range(400)]
    bench = Bench(["cuda:0"] * 3, [work] * 3, workers=workers)
    answers = await bench.answers(frames, at_once=24)
    await bench.close()
    for i, answer in enumerate(answers):
        assert (answer == i + 3).all(), f"frame {i} was corrupted"


@pytest.mark.asyncio
async def test_pinned_slots_are_reused_only_after_their_copy() -> None:
    """More large frames at once than there are slots: each arrives as it was sent."""
    frames = [torch.full((1 << 23,), float(i)) for i in range(4 * SLOTS)]  # 32 MiB each
    bench = Bench(["cuda:0"], [lambda x: (x.amin(), x.amax())])
    answers = await bench.answers(frames, at_once=len(frames))
    await bench.close()
    assert [(low.item(), high.item()) for low, high in answers] == [(float(i), float(i)) for i in range(len(frames))]


@pytest.mark.asyncio
async def test_results_in_host_memory_are_whole_and_stay_so() -> None:
    """Large outputs of a busy device, kept while later ones are written: none is seen half copied or overwritten."""

    def work(x: Any) -> Any:
        busy(x)
        return x.expand(1 << 20) + 1

    bench = Bench(["cuda:0"], [work])
    answers = await bench.answers([torch.tensor([float(i)]) for i in range(64)])
    await bench.close()
    assert all((answer == i + 1).all() for i, answer in enumerate(answers))


@pytest.mark.asyncio
async def test_memory_is_flat() -> None:
    """After a thousand frames no more is allocated than after fifty, and opening anew reserves no more."""
    front, back = halves()
    bench = Bench(["cuda:0", "cuda:0"], [front, back])
    await bench.answers([torch.randn(1, 3, 32, 32) for _ in range(50)])
    allocated = torch.cuda.memory_allocated()
    await bench.answers([torch.randn(1, 3, 32, 32) for _ in range(1000)])
    assert torch.cuda.memory_allocated() <= allocated + (1 << 20)
    await bench.close()
    reserved = torch.cuda.memory_reserved()
    for _ in range(10):
        bench = Bench(["cuda:0", "cuda:0"], [front, back])
        await bench.answers([torch.randn(1, 3, 32, 32) for _ in range(20)])
        await bench.close()
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)


# ---------------------------------------------------------------------- waiting


@pytest.mark.asyncio
async def test_launches_run_ahead_and_the_loop_goes_on(settle: Settle) -> None:
    """While the device is busy with one frame, two more are launched, and the loop turns."""

    def work(x: Any) -> Any:
        busy(x, LONG)
        return x + 1

    bench = Bench(["cuda:0"], [work])
    await bench.answers([torch.zeros(1)])  # the lane, its streams and kernels are there
    launched = [bench.launch(torch.full((1,), float(i))) for i in range(3)]
    await settle(until=lambda: all(pending.done for pending, _ in launched))
    last, result = launched[-1]
    assert isinstance(last.event, Mark)
    assert not last.event.query()
    await settle(500)
    assert not result.done()
    assert [(await result).item() for _, result in launched] == [1.0, 2.0, 3.0]
    await bench.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("rung", ["spin", "wait"])
async def test_wake_up_latency(rung: str, record_property: Callable[[str, object], None]) -> None:
    """One tiny frame at a time, there and back: figures for the report, by rung of the ladder."""
    x = torch.zeros(16)
    bench = Bench(["cuda:0"], [lambda x: x + 1])
    await bench.answers([x] * 50)
    spent = []
    for _ in range(500):
        for pace in bench.streams[0]._paces:  # type: ignore[attr-defined]
            pace.expected = 100e-6 if rung == "spin" else 1.0  # 0.0 spins for 30 us, less than a round trip
        start = time.perf_counter()
        await bench.launch(x)[1]
        spent.append(time.perf_counter() - start)
    await bench.close()
    plain = []
    for _ in range(500):
        start = time.perf_counter()
        (x.cuda() + 1).cpu()
        plain.append(time.perf_counter() - start)
    record_property("p50_us", round(quantile(spent, 0.5) * 1e6, 1))
    record_property("p99_us", round(quantile(spent, 0.99) * 1e6, 1))
    record_property("plain_p50_us", round(quantile(plain, 0.5) * 1e6, 1))


# ---------------------------------------------------------------------- errors


@pytest.mark.asyncio
async def test_running_out_of_memory_costs_one_frame() -> None:
    """Out of memory is an error of that frame; the next one is computed."""

    def work(x: Any) -> Any:
        if x.numel() == 2:
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        return x + 1

    bench = Bench(["cuda:0"], [work])
    futures = [bench.launch(torch.zeros(n))[1] for n in (1, 2, 3)]
    await asyncio.wait(futures)
    await bench.close()
    error = futures[1].exception()
    assert isinstance(error, StageError)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert futures[2].result().tolist() == [1, 1, 1]
    assert futures[0].exception() is None


def test_a_kernel_that_faults_ends_the_run() -> None:
    """The device is lost for the process, so this is another process: it ends, with a BrokenError, and exits."""
    script = """
        import asyncio, torch, aiotime
        from aiotime.errors import BrokenError

        def fault(x):
            if x.numel() == 5:
                return torch.zeros(4, device=x.device)[torch.full((3,), 10**9, device=x.device)]
            return x + 1

        async def main():
            pipeline = aiotime.Pipeline.from_stages([aiotime.Stage(fault, device="cuda:0")])
            try:
                async for _ in pipeline.run((torch.zeros(n + 1) for n in range(100)), on_error="skip"):
                    pass
            except BrokenError as error:
                print("broken:", error)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50, check=False
    )
    assert "broken: cuda:0 failed" in done.stdout, done.stderr


# ---------------------------------------------------------------------- the device


def test_measuring_gives_seconds_and_a_result_on_the_device() -> None:
    """Layers and links cost something; staying where one is costs nothing."""
    device, cpu = CudaDevice(), resolve("cpu:0")
    layer = device.place(torch.nn.Linear(256, 256))
    seconds, result = device.measure(layer, torch.randn(8, 256))
    assert seconds > 0
    assert result.is_cuda
    assert device.transfer_seconds(1 << 20, cpu) > 0
    assert cpu.transfer_seconds(1 << 20, device) == device.transfer_seconds(1 << 20, cpu)
    assert device.transfer_seconds(1 << 20, device) == 0.0


# ---------------------------------------------------------------------- pipelines


def model() -> torch.nn.Sequential:
    """Layers enough for two stages."""
    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    for _ in range(6):
        layers += [torch.nn.Linear(64, 64), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).eval()


@pytest.mark.asyncio
@pytest.mark.may_block
@pytest.mark.parametrize("devices", [["cuda:0"], ["cuda:0", "cuda:0"], ["cpu:0", "cuda:0"]], ids=str)
async def test_a_pipeline_says_what_the_model_says(devices: list[str]) -> None:
    """Cut over one GPU, twice the same GPU, and CPU and GPU."""
    frames = [torch.randn(2, 64) for _ in range(100)]
    plain = model()
    with torch.inference_mode():
        expected = [plain(frame) for frame in frames]
    pipeline = Pipeline(model(), example=frames[0], devices=devices, balance="even")
    outputs = [prediction.output async for prediction in pipeline.run(frames)]
    assert len(outputs) == len(frames)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_no_frame_sees_half_of_the_new_weights() -> None:
    """A swap under load: outputs are the old model's, then the new one's, nothing else."""
    old, new = (
        torch.nn.Sequential(*[Scale(1.0) for _ in range(4)]),
        torch.nn.Sequential(*[Scale(3.0) for _ in range(4)]),
    )
    frames = [torch.ones(1 << 16) for _ in range(300)]
    async with Pipeline(old, example=frames[0], devices=["cuda:0", "cuda:0"], balance="even") as pipeline:
        seen = []
        async for prediction in pipeline.run(frames):
            seen.append(prediction.output.unique().tolist())
            if prediction.index == 50:
                swap = asyncio.create_task(pipeline.load_state_dict(new.state_dict()))
        await swap
        after = (await pipeline.submit(frames[0])).output.unique().tolist()
    assert after == [81.0]
    assert all(values in ([1.0], [81.0]) for values in seen)
    assert seen == sorted(seen)


class Scale(torch.nn.Module):
    """Multiplies by a weight, slowly."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((1,), factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_decode_model_and_post_process() -> None:
    """Host, GPU, host, built from functions, as a service would build it."""
    net = model()
    pipeline = Pipeline.from_stages(
        [
            Stage(lambda i: torch.full((1, 64), i / 100), device="cpu:0", name="decode", workers=2),
            Stage(net, device="cuda:0", name="model"),
            Stage(lambda y: y.argmax().item(), device="cpu:1", name="label"),
        ]
    )
    labels = [prediction.output async for prediction in pipeline.run(range(100))]
    assert len(labels) == 100
    assert all(0 <= label < 64 for label in labels)
