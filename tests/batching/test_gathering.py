"""Frames that wait at a stage run as one job: which, how many, when; each gets an outcome of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiotime
from aiotime import Pipeline, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Work
from aiotime.errors import (
    ClosedError,
    DeadlineExceeded,
    FrameCancelled,
    InputError,
    StageError,
    StageTimeout,
)
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.conftest import Settle

Row = torch.Tensor


def row(value: float) -> Row:
    return torch.full((1,), float(value))


def rows(number: int) -> list[Row]:
    return [row(value) for value in range(number)]


class Bench:
    """A pipeline of one batching stage that adds 1, with what it was called with."""

    def __init__(self, *, device: Any = None, seconds: Any = 1.0, bad: float = -1.0, **options: Any) -> None:
        self.clock = VirtualClock()
        self.batches: list[list[float]] = []
        self.bad = bad
        limits = {key: options.pop(key) for key in ("depth", "budget") if key in options}
        if device is None:
            device = SimulatedDevice(0, seconds=seconds, clock=self.clock)
        self.pipeline = Pipeline.from_stages([Stage(self.plus, device=device, name="plus", **options)], **limits)

    def plus(self, x: Row) -> Row:
        self.batches.append(x.flatten().tolist())
        if self.bad in self.batches[-1]:
            raise ValueError("boom")
        return x + 1


async def answers(pipeline: Pipeline, source: Any, **options: Any) -> list[float]:
    return [pred.output.item() async for pred in pipeline.run(source, **options)]


# ---------------------------------------------------------------------- which frames


@pytest.mark.asyncio
async def test_what_waits_runs_as_one() -> None:
    """The stage is busy with the first frames while others come: those are its next batch, of max_batch at most."""
    bench = Bench(max_batch=4, depth=16)
    assert await answers(bench.pipeline, rows(10)) == [float(i + 1) for i in range(10)]
    assert bench.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert bench.clock.now() == 3.0
    [stage] = bench.pipeline.stats().stages
    assert (stage.frames, stage.failed) == (10, 0)
    assert stage.batch_mean == pytest.approx(10 / 3)
    assert "batch" in str(bench.pipeline.stats())


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 8])
async def test_a_depth_or_budget_below_max_batch(depth: int) -> None:
    """The batch is then what may be in flight; nothing stands still, and nobody waits for who cannot come."""
    for options in ({"depth": depth}, {"depth": 8, "budget": depth}):
        bench = Bench(max_batch=4, max_wait=100.0, **options)
        assert await answers(bench.pipeline, rows(12)) == [float(i + 1) for i in range(12)]
        assert max(map(len, bench.batches)) == min(depth, 4)
        assert bench.clock.now() < 100.0


@pytest.mark.asyncio
async def test_an_adaptive_depth_leaves_room_for_batches() -> None:
    """A heavy stage would get two launches in flight; one that batches gets two batches."""
    bench = Bench(max_batch=8)
    await answers(bench.pipeline, rows(64))
    assert [len(batch) for batch in bench.batches] == [8] * 8
    stats = bench.pipeline.stats()
    assert stats.budget_frames is not None and stats.budget_frames >= 16


@pytest.mark.asyncio
async def test_only_what_is_alike_is_joined() -> None:
    """Another width or dtype ends a batch: order is kept, nothing is passed over."""
    widths = [2, 2, 3, 3, 2, 2]
    source = [torch.full((1, width), float(i)) for i, width in enumerate(widths)]
    source[1] = source[1].double()
    bench = Bench(max_batch=4, depth=16)
    outputs = [pred.output async for pred in bench.pipeline.run(source)]
    assert [tuple(output.shape) for output in outputs] == [(1, width) for width in widths]
    assert [output.dtype for output in outputs] == [item.dtype for item in source]
    assert [len(batch) for batch in bench.batches] == [2, 2, 6, 4]


@pytest.mark.asyncio
async def test_sizes_of_the_first_dimension_may_differ() -> None:
    """``group="cat"``: a frame gets back as many rows as it brought."""
    bench = Bench(max_batch=4, depth=16)
    source = [torch.full((size,), float(size)) for size in (2, 1, 3, 2)]
    outputs = [pred.output.tolist() async for pred in bench.pipeline.run(source)]
    assert outputs == [[3, 3], [2], [4, 4, 4], [3, 3]]
    assert len(bench.batches) == 1


@pytest.mark.asyncio
async def test_stack_makes_the_dimension() -> None:
    """``group="stack"``: also for a frame by itself; structures come back as they are."""
    shapes: list[tuple[int, ...]] = []

    def fn(value: tuple[torch.Tensor, str]) -> dict[str, Any]:
        shapes.append(tuple(value[0].shape))
        return {"twice": 2 * value[0], "name": value[1]}

    device = SimulatedDevice(0, seconds=1.0, clock=VirtualClock())
    stage = Stage(fn, device=device, max_batch=2, group="stack")
    source = [(torch.tensor(float(i)), "a") for i in range(3)]
    outputs = [pred.output async for pred in Pipeline.from_stages([stage], depth=4).run(source)]
    assert shapes == [(2,), (1,)]
    assert [(output["twice"].item(), output["name"]) for output in outputs] == [(0.0, "a"), (2.0, "a"), (4.0, "a")]


@pytest.mark.asyncio
async def test_what_cannot_be_joined_is_refused() -> None:
    """No tensor, no dimension to join along, sizes that contradict each other, constants nobody can compare."""
    bench = Bench(max_batch=2)
    pair = (torch.ones(1), torch.ones(2))
    for wrong, why in (("text", "hand in tensors"), (torch.tensor(1.0), "without dimensions"), (pair, "same size")):
        async with bench.pipeline as pipeline:
            with pytest.raises(InputError, match=why):
                await pipeline.submit(wrong)
    async with bench.pipeline as pipeline:
        with pytest.raises(InputError, match="cannot do so with a set"):
            await pipeline.submit((torch.ones(1), {1}))


@pytest.mark.asyncio
async def test_what_cannot_be_divided() -> None:
    """A function that folds the rows together fails on each frame, with the way out; one frame alone is its own."""
    device = SimulatedDevice(0, seconds=1.0, clock=VirtualClock())
    stage = Stage(lambda x: x.sum(), device=device, max_batch=2, group="stack", name="sum")
    run = Pipeline.from_stages([stage], depth=4).run(rows(2))
    with pytest.raises(InputError, match=r"'sum' was given a batch of 1 .* returned a tensor of shape \(\)"):
        await anext(run)
    await run.aclose()


# ---------------------------------------------------------------------- when


async def paced(clock: VirtualClock, gaps: list[float]) -> AsyncIterator[Row]:
    for i, gap in enumerate(gaps):
        if gap:
            await clock.sleep(gap)
        yield row(i)


@pytest.mark.asyncio
async def test_max_wait_is_how_long_the_first_may_wait() -> None:
    """A batch starts when it is full, or when its first frame has waited that long; without it, at once."""
    bench = Bench(max_batch=3, max_wait=2.0, depth=16)
    # one after the other at 0, 1, 1.5 (full), 10, 11 (not full by 12)
    assert await answers(bench.pipeline, paced(bench.clock, [0, 1, 0.5, 8.5, 1])) == [1, 2, 3, 4, 5]
    assert bench.batches == [[0, 1, 2], [3, 4]]
    assert bench.clock.now() == 13.0  # 10 + 2 + 1 of work
    bench = Bench(max_batch=3, depth=16)
    await answers(bench.pipeline, paced(bench.clock, [0, 2, 2]))
    assert bench.batches == [[0], [1], [2]]


@pytest.mark.asyncio
async def test_closing_waits_for_nobody(settle: Settle) -> None:
    """A frame that waits for company is given up at once where the pipeline is closed."""
    bench = Bench(max_batch=3, max_wait=1000.0, depth=16)
    async with bench.pipeline as pipeline:
        request = asyncio.ensure_future(pipeline.submit(row(0)))
        await asyncio.sleep(0)
        await pipeline.aclose()
        with pytest.raises(ClosedError):
            await request
    assert bench.clock.now() < 1000.0


@pytest.mark.asyncio
async def test_draining_waits_for_nobody() -> None:
    """The last frames start as soon as no other can come."""
    bench = Bench(max_batch=3, max_wait=1000.0, depth=16)
    async with bench.pipeline as pipeline:
        request = asyncio.ensure_future(pipeline.submit(row(0)))
        await asyncio.sleep(0)
        await pipeline.drain()
        assert (await request).output.item() == 1.0
    assert bench.clock.now() <= 1000.0


@pytest.mark.asyncio
async def test_batches_form_late() -> None:
    """Downstream batches are what has come by the time the stage is free, not what was launched together."""
    clock, seen = VirtualClock(), list[int]()

    def second(x: Row) -> Row:
        seen.append(len(x))
        return x

    slow = SimulatedDevice(1, seconds=3.0, clock=clock)
    stages = [
        Stage(lambda x: x, device=SimulatedDevice(0, seconds=1.0, clock=clock), name="one by one"),
        Stage(second, device=slow, max_batch=8),
    ]
    await answers(Pipeline.from_stages(stages, depth=16), rows(10))
    assert seen == [1, 3, 3, 3]


# ---------------------------------------------------------------------- each its own outcome


@pytest.mark.asyncio
async def test_only_the_guilty_frame_fails() -> None:
    """A batch that fails is run again one by one; the neighbours have their results, in order."""
    bench = Bench(max_batch=4, depth=16, bad=2.0)
    run = bench.pipeline.run(rows(8), on_error="skip")
    assert [pred.output.item() async for pred in run] == [1, 2, 4, 5, 6, 7, 8]
    assert bench.batches == [[0, 1, 2, 3], [0], [1], [2], [3], [4, 5, 6, 7]]
    [stage] = bench.pipeline.stats().stages
    assert (stage.frames, stage.failed) == (8, 1)
    bench = Bench(max_batch=4, depth=16, bad=2.0)
    with pytest.raises(StageError, match="stage 'plus' failed at frame 2: ValueError: boom") as caught:
        await answers(bench.pipeline, rows(8))
    assert caught.value.frame == 2


@pytest.mark.asyncio
async def test_retries_are_a_frames_own() -> None:
    """``retry`` gives each frame its attempts, once the batch has failed; the batch is tried once."""
    bench = Bench(max_batch=2, depth=16, bad=1.0, on_error=aiotime.retry(2, backoff=0.0, then="skip"))
    assert await answers(bench.pipeline, rows(2)) == [1.0]
    assert bench.batches == [[0, 1], [0], [1], [1], [1]]


@pytest.mark.asyncio
async def test_a_failure_upstream_is_passed_on() -> None:
    """It takes no place in a batch and no part in its outcome."""
    clock, seen = VirtualClock(), list[list[float]]()

    def first(x: Row) -> Row:
        if x.item() == 1:
            raise ValueError("upstream")
        return x

    def second(x: Row) -> Row:
        seen.append(x.tolist())
        return x

    stages = [
        Stage(first, device=SimulatedDevice(0, seconds=0.0, clock=clock)),
        Stage(second, device=SimulatedDevice(1, seconds=1.0, clock=clock), max_batch=3, max_wait=5.0),
    ]
    pipeline = Pipeline.from_stages(stages, depth=16)
    run = pipeline.run(rows(4), on_error="skip")
    assert [pred.output.item() async for pred in run] == [0, 2, 3]
    assert seen == [[0, 2, 3]]
    assert run.stats().frames_failed == 1


@pytest.mark.asyncio
async def test_cancelled_and_expired_frames_are_left_out() -> None:
    """They are told so, and their neighbours run without them."""
    bench = Bench(max_batch=4, depth=16)
    async with bench.pipeline as pipeline:
        busy = asyncio.ensure_future(pipeline.submit(row(0)))
        await bench.clock.sleep(0.25)
        requests = [asyncio.ensure_future(pipeline.submit(row(i))) for i in range(1, 4)]
        late = asyncio.ensure_future(pipeline.submit(row(9), deadline=0.5))
        await bench.clock.sleep(0.25)
        requests[1].cancel()
        assert (await busy).output.item() == 1
        assert [(await request).output.item() for request in requests[::2]] == [2, 4]
        with pytest.raises(DeadlineExceeded):
            await late
    assert bench.batches == [[0], [1, 3]]


@pytest.mark.asyncio
async def test_runs_and_requests_share_a_batch(settle: Settle) -> None:
    """Frames of different runs are neighbours; each finds its own way back."""
    bench = Bench(max_batch=8, depth=16)
    async with bench.pipeline as pipeline:
        one, two, single = await asyncio.gather(
            answers(pipeline, rows(6)), answers(pipeline, [row(10 + i) for i in range(6)]), pipeline.submit(row(50))
        )
    assert one == [float(i + 1) for i in range(6)]
    assert two == [float(i + 11) for i in range(6)]
    assert single.output.item() == 51
    assert any({0.0, 10.0} & set(batch) and len({value // 10 for value in batch}) > 1 for batch in bench.batches)


@pytest.mark.asyncio
async def test_acknowledgements_come_once() -> None:
    """One per frame of a batch: handed over, failed."""
    acks: list[tuple[int, BaseException | None]] = []
    source = [Sample(row(i), ack=partial(lambda at, error: acks.append((at, error)), i)) for i in range(4)]
    bench = Bench(max_batch=4, depth=16, bad=1.0)
    await answers(bench.pipeline, source, on_error="skip")
    assert [(i, type(error)) for i, error in acks] == [
        (0, type(None)),
        (1, StageError),
        (2, type(None)),
        (3, type(None)),
    ]


@pytest.mark.asyncio
async def test_a_timeout_is_that_of_the_batch() -> None:
    """Nobody can tell which frame it was: all of that batch fail, each with its own number, and no other does."""

    def seconds(work: Work, frame: Frame) -> float:
        return 5.0 if frame.index == 0 else 1.0

    bench = Bench(max_batch=2, depth=16, timeout=2.0, seconds=seconds)
    errors: list[tuple[int, type]] = []

    def dead(frame: Frame, error: Exception) -> None:
        errors.append((frame.index, type(error)))

    assert await answers(bench.pipeline, rows(4), on_error=dead) == [3, 4]
    assert errors == [(0, StageTimeout), (1, StageTimeout)]


# ---------------------------------------------------------------------- on every device


KINDS: list[dict[str, Any]] = [
    {"device": "cpu:0"},
    {"device": "inline"},
    {"device": "cpu:0", "workers": 3},
    {"device": "cpu:0", "max_wait": 0.001},
    {"device": "inline", "max_wait": 0.001},
    {"device": "cpu:0", "timeout": 30.0},
    {"seconds": 1.0, "workers": 2},
]


@pytest.mark.asyncio
@pytest.mark.parametrize("options", KINDS, ids=str)
async def test_every_device(options: dict[str, Any]) -> None:
    """Order, values and failures are the same wherever the batches run."""
    bench = Bench(max_batch=4, bad=17.0, **options)
    expected = [float(i + 1) for i in range(40) if i != 17]
    assert await answers(bench.pipeline, rows(40), on_error="skip") == expected
    [stage] = bench.pipeline.stats().stages
    assert (stage.frames, stage.failed) == (40, 1)
    assert stage.batch_mean >= 1.0


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["cpu:0", "inline"])
async def test_stages_that_share_a_stream(device: str) -> None:
    """Batching and plain stages in turns on one worker: order is kept and nothing waits for what is behind it."""
    stages = [
        Stage(lambda x: x + 1, device=device, max_batch=4),
        Stage(lambda x: x * 2, device=device),
        Stage(lambda x: x - 3, device=device, max_batch=3),
        Stage(lambda x: x + 0, device=device, max_batch=8, max_wait=0.001),
    ]
    pipeline = Pipeline.from_stages(stages)
    assert await answers(pipeline, rows(50)) == [float((i + 1) * 2 - 3) for i in range(50)]


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 3])
async def test_weights_change_between_batches(workers: int) -> None:
    """No batch has frames from both sides of a weight swap, and no frame sees half of one."""
    clock = VirtualClock()
    devices: list[Any] = [SimulatedDevice(k, seconds=1.0 + k, clock=clock) for k in range(2)]
    for places in (devices, ["cpu:0", "cpu:1"], ["cpu:0", "cpu:0"], ["inline", "inline"]):
        if workers > 1 and places[0] == "inline":
            continue
        stages = [
            Stage(torch.nn.Linear(1, 1, bias=False), device=place, name=name, max_batch=4, workers=workers)
            for name, place in zip("ab", places, strict=True)
        ]
        async with Pipeline.from_stages(stages, depth=8) as pipeline:
            for version in range(1, 6):
                weights = {f"{name}.weight": torch.full((1, 1), float(version)) for name in "ab"}
                swap = asyncio.ensure_future(pipeline.load_state_dict(weights))
                requests = [asyncio.ensure_future(pipeline.submit(torch.ones(1, 1))) for _ in range(6)]
                outputs = [(await request).output.item() for request in requests]
                await swap
                assert set(outputs) <= {float((version - 1) ** 2), float(version**2)} or version == 1
                assert (await pipeline.submit(torch.ones(1, 1))).output.item() == version**2


@pytest.mark.asyncio
async def test_a_timeout_on_a_thread(settle: Settle) -> None:
    """The thread that got stuck is replaced, and the frames behind are served."""
    stuck = threading.Event()

    def fn(x: Row) -> Row:
        if 0.0 in x:
            stuck.wait(20)
        return x

    stage = Stage(fn, device="cpu:0", max_batch=2, timeout=0.05)
    async with Pipeline.from_stages([stage], depth=8) as pipeline:
        got = [asyncio.ensure_future(pipeline.submit(row(i))) for i in range(6)]
        try:
            outcomes = await asyncio.gather(*got, return_exceptions=True)
        finally:
            stuck.set()
    failed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, StageTimeout)]
    assert 0 in failed and len(failed) <= 2
    assert [o.output.item() for o in outcomes if not isinstance(o, BaseException)] == [
        float(i) for i in range(6) if i not in failed
    ]


@pytest.mark.asyncio
async def test_a_trace_shows_the_batch() -> None:
    """One slice with the numbers of all its frames; each frame's path leads through it."""
    bench = Bench(max_batch=4, depth=16)
    with bench.pipeline.tracing() as trace:
        await answers(bench.pipeline, rows(6))
    assert [piece.frames for piece in trace.slices if piece.name == "plus"] == [(0, 1, 2, 3), (4, 5)]
    made = [event["args"] for event in trace.to_dict()["traceEvents"] if event.get("name") == "plus"]
    assert made == [{"frame": 0, "batch": [0, 1, 2, 3]}, {"frame": 4, "batch": [4, 5]}]


@pytest.mark.asyncio
async def test_a_closed_run_passes_its_frames_over(settle: Settle) -> None:
    """Frames of a run that was left are not computed; those of another in the same queue are."""
    bench = Bench(max_batch=2, depth=16)
    async with bench.pipeline as pipeline:
        async with pipeline.run([row(100 + i) for i in range(8)]) as run:
            await settle(20)
            other = asyncio.ensure_future(answers(pipeline, rows(4)))
            await settle(20)
            await run.aclose()
        assert await other == [1, 2, 3, 4]
    assert sum(value >= 100 for batch in bench.batches for value in batch) <= 2


@pytest.mark.asyncio
async def test_frame_cancelled_while_its_batch_waits_for_company(settle: Settle) -> None:
    """It leaves; the one behind it becomes the first of the batch."""
    bench = Bench(max_batch=2, max_wait=10.0, depth=16)
    async with bench.pipeline as pipeline:
        gone = asyncio.ensure_future(pipeline.submit(row(0)))
        await settle(3)
        gone.cancel()
        with pytest.raises((asyncio.CancelledError, FrameCancelled)):
            await gone
        assert [p.output.item() for p in await asyncio.gather(*(pipeline.submit(row(i)) for i in (1, 2)))] == [2, 3]
    assert bench.batches == [[1, 2]]
