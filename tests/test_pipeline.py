"""Tests of aiotime.pipeline: building, opening and closing, requests, weights, budgets, warm-up, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from aiotime import Pipeline, Plan, Prediction, Sample, SimulatedDevice, Stage, VirtualClock, retry
from aiotime.errors import (
    BrokenError,
    ClosedError,
    ConfigurationError,
    DeadlineExceeded,
    FrameCancelled,
    FrameError,
    InputError,
    StageError,
)
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.conftest import Settle


def same(x: Any) -> Any:
    return x


def noting(log: list[Any]) -> Callable[[Any], Any]:
    """A stage's function that writes down what it computes."""

    def fn(x: Any) -> Any:
        log.append(x)
        return x

    return fn


def plus(x: Any) -> Any:
    return x + 1


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def pipeline_of(model: nn.Module, **options: Any) -> Pipeline:
    settings: dict[str, Any] = {"example": torch.zeros(2, 4), "devices": ["cpu:0", "cpu:1"], "balance": "even"}
    return Pipeline(model, **settings | options)


async def built(model: nn.Module, **options: Any) -> Pipeline:
    """`pipeline_of` off the loop: tracing and measuring block."""
    return await asyncio.to_thread(pipeline_of, model, **options)


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Tracing imports half of torch, which no collection after a test need look through again."""
    pipeline_of(small())
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def gates(count: int = 1) -> Iterator[list[threading.Event]]:
    """Gates that are open at the end, so that no thread stays behind one."""
    made = [threading.Event() for _ in range(count)]
    try:
        yield made
    finally:
        for gate in made:
            gate.set()


class Weight(nn.Module):
    """Appends its weight to the frame: a swap that is not whole shows as different values behind the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.w])


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.asyncio
@pytest.mark.parametrize("options", [{}, {"balance": "measured"}, {"balance": [1, 3]}, {"devices": ["inline"]}])
async def test_outputs_are_the_models_own(options: dict[str, Any]) -> None:
    """Whatever the cut, the pipeline says what the model says, in eval mode, without autograd."""
    model = small()
    frames = torch.rand(20, 2, 4)
    expected = [model.eval()(frame).detach() for frame in frames]
    preds = [pred async for pred in (await built(model, **options)).run(frames)]
    assert [p.index for p in preds] == list(range(20))
    for pred, want in zip(preds, expected, strict=True):
        torch.testing.assert_close(pred.output, want)
        assert not pred.output.requires_grad


@pytest.mark.asyncio
async def test_several_inputs_and_a_dict_output() -> None:
    """Tuples are positional, dicts keyword arguments; the output has the model's own structure."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.first(a)
            return {"sum": self.second(hidden) + b, "hidden": hidden}

    model = Two()
    a, b = torch.rand(1, 4), torch.rand(1, 4)
    want = model(a, b)
    for example in ((a, b), {"a": a, "b": b}):
        [pred] = [pred async for pred in (await built(model, example=example)).run([example])]
        assert pred.output.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(pred.output[key], want[key].detach())


@pytest.mark.asyncio
async def test_wrong_frames_are_refused_and_the_stream_goes_on() -> None:
    """A frame that the model cannot take is an InputError in its turn; with skip the others come out."""
    frames: list[Any] = [torch.rand(2, 4), torch.rand(2, 5), "text", torch.rand(2, 4).double(), torch.rand(2, 4)]
    acks: list[BaseException | None] = []
    samples = [Sample(frame, key=i, ack=acks.append) for i, frame in enumerate(frames)]
    async with await built(small()) as pipeline:
        run = pipeline.run(samples, on_error="skip")
        assert [pred.key async for pred in run] == [0, 4]
        assert (run.stats().frames_failed, pipeline.stats().frames_failed) == (3, 3)
        assert [type(ack) for ack in acks] == [type(None), InputError, InputError, InputError, type(None)]
        with pytest.raises(InputError, match=r"frame 1 was refused: expected a float32 tensor of shape \(2, 4\)"):
            async for _ in pipeline.run(samples):
                pass
        with pytest.raises(InputError, match="the request was refused"):
            await pipeline.submit("text")


@pytest.mark.asyncio
async def test_a_refused_request_is_counted_and_acknowledged(settle: Settle) -> None:
    """A request that is refused at the door is a failed frame like any other."""
    acks: list[BaseException | None] = []
    async with await built(small()) as pipeline:
        with pytest.raises(InputError):
            await pipeline.submit(Sample("text", ack=acks.append))
        await settle()
        stats = pipeline.stats()
        assert (stats.frames_in, stats.frames_failed) == (1, 1)
    assert [type(ack) for ack in acks] == [InputError]


@pytest.mark.asyncio
async def test_check_finite() -> None:
    """NaN is refused where that was asked for, told as a refusal of the frame."""
    nan = torch.full((2, 4), torch.nan)
    async with await built(small(), check_finite=True) as pipeline:
        with pytest.raises(InputError, match="8 NaN or infinite of 8") as caught:
            await pipeline.submit(Sample(nan, key="k"))
        assert (caught.value.stage, caught.value.key) == (None, "k")
        assert (await pipeline.submit(torch.zeros(2, 4))).output.isfinite().all()
    async with await built(small()) as pipeline:
        assert (await pipeline.submit(nan)).output.isnan().any()


@pytest.mark.asyncio
async def test_dynamic_shapes() -> None:
    """A dim that was declared to vary does, in one run; the others may not."""
    model = small()
    frames = [torch.rand(n, 4) for n in (2, 5, 3, 7)]
    pipeline = await built(model, dynamic=(0,))
    outputs = [pred.output async for pred in pipeline.run(frames)]
    for frame, output in zip(frames, outputs, strict=True):
        torch.testing.assert_close(output, model(frame).detach())
    with pytest.raises(InputError, match=r"shape \(any, 4\)"):
        _ = [pred async for pred in pipeline.run([torch.rand(5, 5)])]


@pytest.mark.asyncio
async def test_a_plan_made_earlier() -> None:
    """A pipeline built from a saved plan has that plan's cut and the model's output."""
    model, frame = small(), torch.rand(2, 4)
    plan = Plan.from_json((await built(model, balance=[3, 1])).plan.to_json())  # type: ignore[union-attr]
    pipeline = await asyncio.to_thread(Pipeline, model, example=frame, plan=plan)
    assert pipeline.plan is not None
    assert pipeline.plan.sizes == (3, 1)
    [pred] = [pred async for pred in pipeline.run([frame])]
    torch.testing.assert_close(pred.output, model(frame).detach())


@pytest.mark.asyncio
async def test_warm_up(settle: Settle) -> None:
    """Copies of the example go through before the first frame, once per opening, and are counted nowhere."""
    calls: list[torch.Size] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = nn.Sequential(nn.Linear(4, 4), Counting())
    pipeline = await built(model, warm_up=3, depth=1, balance=[1, 1])
    inner = pipeline._specs[0].fn

    def counted(x: Any) -> Any:
        calls.append(x.shape)
        return inner(x)

    pipeline._specs[0].fn = counted
    for opening in range(1, 3):
        async with pipeline:
            assert len(calls) == 3 * opening + opening - 1
            assert pipeline.stats().stages[0].frames == 0
            await pipeline.submit(torch.zeros(2, 4))
            stats = pipeline.stats()
            assert (stats.frames_in, stats.frames_out, stats.stages[0].frames) == (1, 1, 1)


@pytest.mark.asyncio
async def test_a_run_during_warm_up_waits_and_is_counted() -> None:
    """A run that opens the pipeline itself gets its frames behind the warm-up, with counts of its own."""
    pipeline = await built(small(), warm_up=5)
    async with pipeline.run(torch.zeros(10, 2, 4)) as run:
        async for pred in run:
            stats = pipeline.stats()
            assert stats.frames_in >= stats.frames_out == pred.index + 1
    assert (stats.frames_in, stats.frames_failed, stats.frames_shed) == (10, 0, 0)


@pytest.mark.asyncio
async def test_a_warm_up_that_fails_is_told_at_once() -> None:
    """A stage that cannot even take the example makes opening fail."""
    pipeline = await built(small(), warm_up=2)

    def broken(x: Any) -> Any:
        raise ValueError("no kernel")

    pipeline._specs[1].fn = broken
    with pytest.raises(BrokenError, match=r"warm-up of pipeline .* failed: .*no kernel"):
        async with pipeline:
            pass


def test_what_cannot_be_built() -> None:
    """Arguments that cannot work are refused with what would."""
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (same, {}, "for functions use Pipeline.from_stages"),
        (small(), {"depth": 0}, "depth must be at least 1"),
        (small(), {"budget": 0}, "budget must be at least 1"),
        (small(), {"warm_up": -1}, "number of frames"),
        (small(), {"devices": ["gpu:0"]}, "no device is called 'gpu:0'"),
        (small(), {"devices": []}, "devices is empty"),
        (small(), {"example": 3}, "holds no tensor"),
    ]
    for model, options, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            pipeline_of(model, **options)
    with pytest.raises(ConfigurationError, match="at least one stage"):
        Pipeline.from_stages([])
    with pytest.raises(ConfigurationError, match="has one worker"):
        asyncio.run(Pipeline.from_stages([Stage(same, device="inline", workers=2)]).__aenter__())


@pytest.mark.asyncio
async def test_stages_of_functions_and_modules() -> None:
    """Functions take the value as it is, modules spread a tuple; each unnamed device is a worker of its own."""
    pipeline = Pipeline.from_stages([lambda x: (x, 2 * x), nn.Bilinear(1, 1, 1), Stage(torch.sum, device="cpu:1")])
    assert repr(pipeline) == "<Pipeline 'pipeline': stage@cpu:0, Bilinear@cpu:2, sum@cpu:1>"
    assert len([pred async for pred in pipeline.run(torch.rand(3, 1, 1))]) == 3


@pytest.mark.asyncio
async def test_retry_in_a_pipeline() -> None:
    """A stage that fails now and then is tried again; what fails every time is the stage's own policy."""
    calls: dict[int, int] = {}

    def flaky(x: int) -> int:
        calls[x] = calls.get(x, 0) + 1
        if x == 5 or calls[x] < 3:
            raise ValueError(f"attempt {calls[x]}")
        return x

    stage = Stage(flaky, on_error=retry(2, backoff=0, then="skip"))
    assert [p.output async for p in Pipeline.from_stages([stage]).run(range(8))] == [0, 1, 2, 3, 4, 6, 7]
    assert set(calls.values()) == {3}


# ------------------------------------------------------------------------------------------------------ requests


@pytest.mark.asyncio
async def test_a_thousand_requests_at_once() -> None:
    """Each of a thousand concurrent requests gets its own answer, key and latency."""
    async with Pipeline.from_stages([plus, Stage(plus, workers=3), plus], budget=16) as pipeline:
        answers = await asyncio.gather(*(pipeline.submit(Sample(i, key=i)) for i in range(1000)))
        assert [(a.output, a.key) for a in answers] == [(i + 3, i) for i in range(1000)]
        assert all(a.latency > 0 for a in answers)
        stats = pipeline.stats()
        assert (stats.frames_in, stats.frames_out, stats.in_flight, stats.waiting) == (1000, 1000, 0, 0)


@pytest.mark.asyncio
async def test_requests_need_an_open_pipeline() -> None:
    """Before opening and after closing a request is refused with what to do."""
    pipeline = Pipeline.from_stages([same])
    with pytest.raises(ClosedError, match="use 'async with pipeline:'"):
        await pipeline.submit(1)
    with pytest.raises(ClosedError):
        pipeline.stats()
    async with pipeline:
        await pipeline.submit(1)
    with pytest.raises(ClosedError):
        await pipeline.submit(1)


@pytest.mark.asyncio
async def test_cancelled_requests_are_never_computed(settle: Settle) -> None:
    """Cancelling takes the work out: at the door, and in the queue of a stage; the others get their answers."""
    ran: list[int] = []
    acks: dict[int, list[BaseException | None]] = {i: [] for i in range(8)}
    with gates() as [gate]:

        def gated(x: int) -> int:
            ran.append(x)
            gate.wait()
            return x

        async with Pipeline.from_stages([gated, same], depth=2, budget=4) as pipeline:
            tasks = [asyncio.create_task(pipeline.submit(Sample(i, ack=acks[i].append))) for i in range(8)]
            await settle(until=lambda: ran and pipeline.stats().waiting == 4)
            for task in tasks[1:7]:
                task.cancel()
            await settle()
            assert pipeline.stats().waiting == 1
            gate.set()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            await pipeline.drain()
            assert pipeline.stats().frames_shed == 6
            assert pipeline._engine is not None
            assert pipeline._engine.door.used == 0
    assert ran == [0, 7]
    assert [isinstance(x, asyncio.CancelledError) for x in done] == [False] + [True] * 6 + [False]
    assert [[type(ack) for ack in acks[i]] for i in range(8)] == [
        [type(None)],
        *[[FrameCancelled]] * 6,
        [type(None)],
    ]


@pytest.mark.asyncio
async def test_a_request_that_expires_at_the_door(settle: Settle) -> None:
    """A request whose deadline passes while it waits is answered then, shed, and never computed."""
    ran: list[int] = []
    acks: list[BaseException | None] = []
    with gates() as [gate]:

        def gated(x: int) -> int:
            ran.append(x)
            gate.wait()
            return x

        async with Pipeline.from_stages([gated], depth=1, budget=1) as pipeline:
            first = asyncio.create_task(pipeline.submit(0))
            await settle(until=lambda: ran)
            with pytest.raises(DeadlineExceeded, match="deadline") as caught:
                await pipeline.submit(Sample(1, key="k", deadline=0.01, ack=acks.append))
            assert isinstance(caught.value, TimeoutError)
            assert caught.value.key == "k"
            assert pipeline.stats().waiting == 0
            queued = asyncio.create_task(pipeline.submit(2, deadline=60.0))
            gate.set()
            assert ((await first).output, (await queued).output) == (0, 2)
            assert pipeline.stats().frames_shed == 1
    assert ran == [0, 2]
    assert [type(ack) for ack in acks] == [DeadlineExceeded]


@pytest.mark.asyncio
async def test_a_request_that_expires_in_virtual_time() -> None:
    """On simulated devices deadlines are virtual: shed before it is computed, to the tick."""
    clock = VirtualClock()
    device = SimulatedDevice(0, seconds=1.0, clock=clock)
    ran: list[int] = []
    stage = Stage(noting(ran), device=device)
    async with Pipeline.from_stages([stage], depth=8, budget=8) as pipeline:
        done = await asyncio.gather(*(pipeline.submit(i, deadline=2.5) for i in range(5)), return_exceptions=True)
    assert ran == [0, 1, 2]
    assert [type(x) for x in done] == [Prediction] * 3 + [DeadlineExceeded] * 2


@pytest.mark.asyncio
async def test_a_failed_request_and_the_stages_letter_box() -> None:
    """A stage's dead-letter callable gets a failed request too, with its input; the caller gets the error."""
    letters: list[tuple[Any, type[FrameError]]] = []

    def letter(frame: Frame, error: FrameError) -> None:
        letters.append((frame.input, type(error)))

    def bad(x: int) -> int:
        raise ValueError("boom")

    async with Pipeline.from_stages([plus, Stage(bad, on_error=letter)]) as pipeline:
        with pytest.raises(StageError, match="stage 'bad' failed at frame 0: ValueError: boom"):
            await pipeline.submit(1)
        assert pipeline.stats().frames_failed == 1
    assert letters == [(1, StageError)]


@pytest.mark.asyncio
async def test_requests_are_told_when_the_pipeline_closes(settle: Settle) -> None:
    """Requests inside and at the door get ClosedError; their acks are called once."""
    acks: list[BaseException | None] = []
    with gates() as [gate]:
        pipeline = Pipeline.from_stages([lambda x: gate.wait()], budget=2)
        async with pipeline:
            tasks = [asyncio.create_task(pipeline.submit(Sample(i, ack=acks.append))) for i in range(5)]
            await settle()
            closing = asyncio.create_task(pipeline.aclose())
            done = await asyncio.gather(*tasks, return_exceptions=True)
            gate.set()
            await closing
    assert [type(x) for x in done] == [ClosedError] * 5
    await settle()
    assert [type(x) for x in acks] == [ClosedError] * 5


# ----------------------------------------------------------------------------------------- pausing and draining


@pytest.mark.asyncio
async def test_pause_and_resume(settle: Settle) -> None:
    """While paused nothing enters, neither requests nor frames of runs; afterwards all of it does."""
    ran: list[int] = []
    async with Pipeline.from_stages([noting(ran)]) as pipeline:
        pipeline.pause()
        request = asyncio.create_task(pipeline.submit(7))
        async with pipeline.run(range(3)) as run:
            await settle(300)
            assert ran == []
            assert pipeline.stats().waiting == 2
            pipeline.resume()
            assert [pred.index async for pred in run] == [0, 1, 2]
        assert (await request).output == 7


@pytest.mark.asyncio
async def test_drain_finishes_what_was_accepted(settle: Settle) -> None:
    """Queued requests finish, new ones and new runs are refused, runs end after what was in flight; resume reopens."""

    async def endless() -> AsyncIterator[int]:
        i = 0
        while True:
            yield i
            i += 1

    with gates() as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x], budget=2) as pipeline:
            requests = [asyncio.create_task(pipeline.submit(i)) for i in range(6)]
            run = pipeline.run(endless())

            async def consume() -> list[int]:
                return [pred.index async for pred in run]

            running = asyncio.create_task(consume())
            await settle()
            draining = asyncio.create_task(pipeline.drain())
            await settle()
            with pytest.raises(ClosedError, match="draining and takes no new requests"):
                await pipeline.submit(9)
            with pytest.raises(ClosedError, match="draining and takes no new runs"):
                await anext(pipeline.run([1]))
            assert not draining.done()
            gate.set()
            await draining
            assert [(await request).output for request in requests] == list(range(6))
            indices = await running
            assert indices == list(range(len(indices)))
            assert pipeline.stats().in_flight == 0
            pipeline.resume()
            assert (await pipeline.submit(5)).output == 5


@pytest.mark.asyncio
async def test_draining_lifts_a_pause(settle: Settle) -> None:
    """A paused pipeline drains what waits at its door."""
    async with Pipeline.from_stages([same]) as pipeline:
        pipeline.pause()
        request = asyncio.create_task(pipeline.submit(1))
        await settle()
        await asyncio.wait_for(pipeline.drain(), 20)
        assert (await request).output == 1


@pytest.mark.asyncio
async def test_calls_on_a_closed_pipeline_that_need_nothing() -> None:
    """Draining, pausing, resuming and closing what is not open do nothing."""
    pipeline = Pipeline.from_stages([same])
    await pipeline.drain()
    pipeline.pause()
    pipeline.resume()
    await pipeline.aclose()


# ------------------------------------------------------------------------------------------------------ budgets


@pytest.mark.asyncio
async def test_the_budget_of_frames_is_adjusted_live(settle: Settle) -> None:
    """Raised, more frames enter at once; lowered, no new one enters until enough have left."""
    with gates(1) as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x], budget=2) as pipeline:
            requests = [asyncio.create_task(pipeline.submit(i)) for i in range(10)]
            await settle()
            assert (pipeline.stats().in_flight, pipeline.stats().waiting) == (2, 8)
            pipeline.set_budget(frames=5)
            assert (pipeline.stats().in_flight, pipeline.stats().waiting) == (5, 5)
            pipeline.set_budget(frames=1)
            assert pipeline.stats().in_flight == 5
            gate.set()
            assert [(await request).output for request in requests] == list(range(10))
            assert pipeline.stats().budget_frames == 1
            pipeline.set_budget()
            assert pipeline.stats().budget_frames == pipeline._engine.depth  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_a_budget_of_bytes(settle: Settle) -> None:
    """Payload bytes in flight stay within their budget; a frame above it goes alone; lifted live."""
    with gates(1) as [gate]:

        def fn(x: torch.Tensor) -> int:
            gate.wait()
            return x.nbytes

        async with Pipeline.from_stages([fn], budget=10, budget_bytes=100) as pipeline:
            sizes = [10, 10, 10, 200, 10, 5]
            requests = [asyncio.create_task(pipeline.submit(torch.zeros(4 * n))) for n in sizes]
            await settle()
            assert pipeline.stats().in_flight == 1  # 160 bytes alone
            pipeline.set_budget(frames=10, nbytes=480)
            assert pipeline.stats().bytes_in_flight == 480
            pipeline.set_budget(frames=10, nbytes=100)
            gate.set()
            assert [(await request).output for request in requests] == [16 * n for n in sizes]
            assert pipeline.stats().bytes_in_flight == 0
        gate.set()
        async with Pipeline.from_stages([fn], budget=10, budget_bytes=64) as pipeline:
            got = [pred.output async for pred in pipeline.run(torch.zeros(50, 8))]
            assert got == [32] * 50
            assert pipeline.stats().bytes_in_flight == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("overflow", ["wait", "drop_oldest"])
async def test_frames_of_a_run_keep_within_the_bytes(settle: Settle, overflow: Any) -> None:
    """A run's frames are let in by their own bytes, one after the other."""
    with gates(1) as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x], budget=10, budget_bytes=100) as pipeline:
            frames = [torch.zeros(n) for n in (10, 10, 10, 1, 100, 1)]
            async with pipeline.run(frames, overflow=overflow, window=6) as run:
                await settle(300)
                assert (pipeline.stats().in_flight, pipeline.stats().bytes_in_flight) == (2, 80)
                gate.set()
                assert [pred.index async for pred in run] == list(range(6))
            assert pipeline.stats().bytes_in_flight == 0


def test_budgets_are_checked() -> None:
    """A budget of nothing is refused, open or not."""
    pipeline = Pipeline.from_stages([same])
    with pytest.raises(ConfigurationError, match="at least one frame"):
        pipeline.set_budget(frames=0)
    with pytest.raises(ConfigurationError, match="byte budget"):
        pipeline.set_budget(nbytes=0)


# ------------------------------------------------------------------------------------------------------- weights


def test_state_dict_has_the_models_keys() -> None:
    """Keys, order and values are those of the model handed in, whatever the cut."""
    model = small()
    pipeline = pipeline_of(model)
    assert list(pipeline.state_dict()) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(pipeline.state_dict()[key], tensor)


@pytest.mark.asyncio
@pytest.mark.parametrize("running", [False, True])
async def test_loading_weights(running: bool) -> None:
    """With another model's weights the pipeline says what that model says; the old model is as it was."""
    model, other, frame = small(), small(), torch.rand(2, 4)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    before = model.eval()(frame).detach()
    pipeline = await built(model)
    if not running:
        await pipeline.load_state_dict(other.state_dict())
    async with pipeline:
        if running:
            torch.testing.assert_close((await pipeline.submit(frame)).output, before)
            await pipeline.load_state_dict(other.state_dict())
        torch.testing.assert_close((await pipeline.submit(frame)).output, other.eval()(frame).detach())
    torch.testing.assert_close(model(frame).detach(), before)
    torch.testing.assert_close(pipeline.state_dict()["3.bias"], other.state_dict()["3.bias"])


@pytest.mark.asyncio
@pytest.mark.parametrize("running", [False, True])
async def test_weights_that_do_not_fit_change_nothing(running: bool) -> None:
    """Missing or unexpected keys and wrong shapes are told by name, before anything is replaced."""
    model, frame = small(), torch.rand(2, 4)
    good = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    cases = [
        ({k: v for k, v in good.items() if k != "3.bias"}, "missing keys .'3.bias'."),
        (good | {"4.bias": torch.zeros(1)}, "unexpected keys .'4.bias'."),
        (good | {"3.bias": torch.zeros(9)}, r"'3.bias' has shape \(9,\), the model's is \(3,\)"),
    ]
    async with contextlib.AsyncExitStack() as stack:
        pipeline = await built(model)
        if running:
            await stack.enter_async_context(pipeline)
        for state, message in cases:
            with pytest.raises(ConfigurationError, match=message):
                await pipeline.load_state_dict(state)
        [pred] = [pred async for pred in pipeline.run([frame])]
        torch.testing.assert_close(pred.output, model(frame).detach())


@pytest.mark.asyncio
async def test_some_of_the_weights() -> None:
    """With strict=False what is missing keeps its value, and what is unknown is ignored."""
    model, frame = small().eval(), torch.rand(2, 4)
    async with await built(model) as pipeline:
        await pipeline.load_state_dict({"3.bias": torch.full((3,), 100.0), "9": torch.zeros(1)}, strict=False)
        await pipeline.load_state_dict({"0.bias": model.state_dict()["0.bias"]}, strict=False)
        want = model(frame) - model.state_dict()["3.bias"] + 100.0
        torch.testing.assert_close((await pipeline.submit(frame)).output, want.detach())


@pytest.mark.asyncio
async def test_tied_weights_stay_tied_when_some_are_loaded() -> None:
    """Loading one name of a tensor that has two gives it to both, as PyTorch does."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.two(torch.relu(self.one(x)))
            return result

    for key in ("one.weight", "two.weight"):
        model, frame = Tied(), torch.rand(1, 4)
        async with await built(model, example=frame) as pipeline:
            await pipeline.load_state_dict({key: torch.eye(4) * 2}, strict=False)
            torch.testing.assert_close((await pipeline.submit(frame)).output, frame * 4)


@pytest.mark.asyncio
async def test_no_frame_sees_half_of_the_old_weights() -> None:
    """With swaps in mid-stream and three workers, each frame sees one version on all stages, and none goes back."""
    versions: set[float] = set()
    stages = [Stage(Weight(), name="a"), Stage(Weight(), name="b", workers=3), Stage(Weight(), name="c")]
    async with Pipeline.from_stages(stages, depth=4) as pipeline, pipeline.run(lambda: torch.empty(0)) as run:
        version, last = 0, 0.0
        swap: asyncio.Task[None] | None = None
        async for pred in run:
            seen = set(pred.output.tolist())
            assert len(seen) == 1
            [now] = seen
            assert now >= last
            last = now
            versions.add(now)
            if swap is None or swap.done():
                version += 1
                state = {f"{name}.w": torch.full((1,), float(version)) for name in "abc"}
                swap = asyncio.create_task(pipeline.load_state_dict(state))
            if len(versions) > 20:
                break
        assert swap is not None
        await swap
    assert sorted(versions) == [float(v) for v in range(len(versions))]
    assert {key: tensor.item() for key, tensor in pipeline.state_dict().items()} == dict.fromkeys(
        ("a.w", "b.w", "c.w"), float(version)
    )


@pytest.mark.asyncio
async def test_modules_of_one_name() -> None:
    """Stages whose modules have one name are numbered, and their weights are loaded apart."""
    pipeline = Pipeline.from_stages([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    assert list(pipeline.state_dict()) == ["Linear.weight", "Linear.2.weight"]
    state = {"Linear.weight": torch.full((1, 1), 3.0), "Linear.2.weight": torch.full((1, 1), 5.0)}
    async with pipeline:
        await pipeline.load_state_dict(state)
        assert (await pipeline.submit(torch.ones(1, 1))).output.item() == 15.0


@pytest.mark.asyncio
async def test_a_swap_that_fails_holds_up_nobody() -> None:
    """When a stage cannot take its weights the caller is told, and frames go on through every worker."""

    class Stubborn(Weight):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("no")

    async with Pipeline.from_stages([Stage(Stubborn(), name="a"), Stage(Weight(), name="b", workers=3)]) as pipeline:
        with pytest.raises(StageError, match="stage 'a' failed at frame -1: ValueError: no"):
            await pipeline.load_state_dict({"a.w": torch.ones(1), "b.w": torch.ones(1)})
        outputs = [pred.output.tolist() async for pred in pipeline.run([torch.empty(0)] * 20)]
        assert outputs == [[0.0, 0.0]] * 20


@pytest.mark.asyncio
async def test_weights_stay_fit_for_learning() -> None:
    """Loaded weights are ordinary tensors, not inference tensors, and keep requires_grad."""
    model = small()
    with torch.inference_mode():
        state = {key: value.clone() for key, value in model.state_dict().items()}
    async with await built(model) as pipeline:
        await pipeline.load_state_dict(state)
        for piece in pipeline._pieces:
            for parameter in piece.module.parameters():
                assert parameter.requires_grad
                assert not parameter.is_inference()


# ----------------------------------------------------------------------------------------------- life and loops


@pytest.mark.asyncio
async def test_open_twice_is_refused() -> None:
    """A pipeline that is open by hand cannot be entered again; it can after it was closed."""
    pipeline = Pipeline.from_stages([same])
    for _ in range(2):
        async with pipeline:
            with pytest.raises(ConfigurationError, match="open already"):
                await pipeline.__aenter__()
            assert (await pipeline.submit(1)).output == 1


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_a_second_loop_is_refused() -> None:
    """While it is open on one loop, a pipeline refuses another loop's runs and requests, with the way out."""
    async with Pipeline.from_stages([same]) as pipeline:

        async def elsewhere() -> None:
            with pytest.raises(ConfigurationError, match="another event loop"):
                await pipeline.submit(1)
            with pytest.raises(ConfigurationError, match="one pipeline per loop"):
                await anext(pipeline.run([1]))

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert (await pipeline.submit(1)).output == 1


def test_two_loops_in_a_row() -> None:
    """One pipeline serves one asyncio.run after the other."""
    pipeline = Pipeline.from_stages([plus, plus])

    async def main() -> list[int]:
        async with pipeline:
            return [pred.output async for pred in pipeline.run(range(3))]

    assert [asyncio.run(main()) for _ in range(2)] == [[2, 3, 4]] * 2


def test_a_loop_that_ended_in_the_middle(caplog: pytest.LogCaptureFixture) -> None:
    """An open pipeline in a script that crashes leaves no thread and no complaint, and opens again."""
    pipeline = Pipeline.from_stages([plus])

    async def crash() -> None:
        await pipeline.__aenter__()
        asyncio.create_task(pipeline.submit(1), name="forgotten")  # noqa: RUF006 - forgotten on purpose
        await asyncio.sleep(0)
        raise KeyError("script")

    async def main() -> int:
        async with pipeline:
            return int((await pipeline.submit(1)).output)

    with pytest.raises(KeyError, match="script"):
        asyncio.run(crash())
    pipeline._entered = False
    gc.collect()
    assert asyncio.run(main()) == 2
    assert caplog.records == []


@pytest.mark.asyncio
async def test_many_pipelines_at_once() -> None:
    """Twenty open pipelines do not disturb each other."""

    async def one(k: int) -> list[int]:
        async with Pipeline.from_stages([lambda x: x + k, plus]) as pipeline:
            return [pred.output async for pred in pipeline.run(range(10))]

    got = await asyncio.gather(*(one(k) for k in range(20)))
    assert got == [[i + k + 1 for i in range(10)] for k in range(20)]


@pytest.mark.asyncio
async def test_an_error_inside_async_with_is_the_one_raised() -> None:
    """Closing does not replace the error of the body."""
    with pytest.raises(KeyError, match="mine"):
        async with Pipeline.from_stages([same]) as pipeline, pipeline.run(range(10**9)) as run:
            async for _ in run:
                raise KeyError("mine")


# --------------------------------------------------------------------------------------------------- observation


@pytest.mark.asyncio
async def test_stats_print(settle: Settle) -> None:
    """The snapshot of a running pipeline shows stages, counts and budget."""
    with gates() as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x, same], depth=2, name="demo") as pipeline:
            async with pipeline.run(range(100)) as run:
                await settle(300)
                stats = pipeline.stats()
                assert (stats.name, stats.in_flight, stats.budget_frames, stats.waiting) == ("demo", 4, 4, 0)
                assert stats.stages[0].queue == 3
                assert "demo" in str(stats)
                gate.set()
                assert len([pred async for pred in run]) == 100
            assert pipeline.stats().frames_out == 100


@pytest.mark.asyncio
async def test_tracing() -> None:
    """What happens inside tracing() is recorded, also when the pipeline opens only then."""
    pipeline = Pipeline.from_stages([Stage(same, name="first"), Stage(same, name="second")])
    with pipeline.tracing() as trace:
        _ = [pred async for pred in pipeline.run(range(5))]
    assert sorted((piece.name, piece.frame) for piece in trace.slices if piece.lane != "loop") == [
        (name, frame) for name in ("first", "second") for frame in range(5)
    ]
