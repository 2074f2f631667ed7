"""Tests of aiotime.engine: adaptive depth, sharing of threads, time-outs, and the one place where a frame ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aiotime import CpuDevice, InlineDevice, Pipeline, SimulatedDevice, Stage, VirtualClock
from aiotime.devices.base import Completions, RealClock
from aiotime.devices.worker import WorkerStream
from aiotime.engine import DEEPEST, SHALLOWEST, Engine, depth_for
from aiotime.errors import AiotimeError, BrokenError, ClosedError, StageTimeout
from aiotime.frame import Frame
from aiotime.stage import StageSpec

if TYPE_CHECKING:
    from tests.conftest import Settle


def same(x: Any) -> Any:
    return x


class Owner:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def settled(self, frame: Frame) -> None:
        self.frames.append(frame)


@asynccontextmanager
async def opened(*specs: StageSpec, depth: int | None = 2, frames: int | None = None) -> AsyncIterator[Engine]:
    engine = Engine(specs, name="p", depth=depth, frames=frames, nbytes=None, clock=RealClock())
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.wait_for(engine.close(), 20)


def spec(fn: Callable[[Any], Any] = same, *, name: str = "s", index: int = 0, **options: Any) -> StageSpec:
    return StageSpec(name, fn, CpuDevice(index), **options)


def put(engine: Engine, owner: Owner, payload: Any, index: int = 0) -> Frame:
    frame = engine.new_frame(owner, index, payload)
    assert engine.door.take()
    engine.enter(frame)
    return frame


# --------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize(
    ("seconds", "depth"), [(0.0, DEEPEST), (1e-6, DEEPEST), (1e-4, 40), (1e-3, 4), (1.0, SHALLOWEST)]
)
def test_depth_for(seconds: float, depth: int) -> None:
    """Stages of microseconds get tens of launches in flight, those of a millisecond four, heavy ones two."""
    assert depth_for(seconds) == depth


@pytest.mark.asyncio
async def test_an_adaptive_depth_follows_the_stages_times(settle: Settle) -> None:
    """Without a given depth, stages of microseconds deepen the pipeline and its budget while it runs."""
    async with Pipeline.from_stages([same, same]) as pipeline:
        engine = pipeline._engine
        assert engine is not None
        before = engine.depth
        async with pipeline.run(range(10**9)) as run:
            async for _ in run:
                if engine.depth == DEEPEST:
                    break
                await asyncio.sleep(0)
        assert before < DEEPEST
        assert [stage.limit for stage in engine.stages] == [DEEPEST, DEEPEST]
        assert engine.door.frames == 2 * DEEPEST


@pytest.mark.asyncio
async def test_a_given_depth_stays() -> None:
    """A depth or a budget that was asked for is not adapted."""
    async with Pipeline.from_stages([same, Stage(same, workers=3)], depth=3) as pipeline:
        engine = pipeline._engine
        assert engine is not None
        _ = [pred async for pred in pipeline.run(range(3000))]
        assert (engine.depth, [stage.limit for stage in engine.stages], engine.door.frames) == (3, [3, 9], 12)


@pytest.mark.asyncio
async def test_a_plan_gives_the_first_guess() -> None:
    """Where the stages' time is known, the depth starts from it."""
    specs = [spec()]
    guessed = Engine(specs, name="p", depth=None, frames=None, nbytes=None, clock=RealClock(), first_guess=1e-4)
    guessed.start()
    assert (guessed.depth, guessed.door.frames) == (40, 40)
    await guessed.close()


# ------------------------------------------------------------------------------------------- where a frame ends


@pytest.mark.asyncio
async def test_a_frame_ends_once(settle: Settle) -> None:
    """The first outcome wins: one credit back, the owner told once."""
    async with opened(spec()) as engine:
        owner = Owner()
        frame = put(engine, owner, 5)
        engine.settle(frame, ClosedError("first"))
        engine.settle(frame, None)
        await settle(until=lambda: engine.stages[0].work.recorders[0].jobs or frame.settled)
        await settle()
        assert owner.frames == [frame]
        assert str(frame.error) == "first"
        assert (engine.door.used, engine.frames) == (0, set())


@pytest.mark.asyncio
async def test_the_end_reaches_everybody(settle: Settle) -> None:
    """After the end, frames inside and frames that come later settle with the reason."""
    gate = threading.Event()
    async with opened(spec(lambda x: gate.wait())) as engine:
        owner = Owner()
        frames = [put(engine, owner, i, i) for i in range(2)]
        await settle()
        engine.end(BrokenError("the device died"))
        frames.append(put(engine, owner, 2, 2))
        assert sorted(f.index for f in owner.frames) == [0, 1, 2]
        assert {str(f.error) for f in frames} == {"the device died"}
        engine.end(ClosedError("later"))
        assert str(engine.error) == "the device died"
        gate.set()
    assert engine.door.used == 0


@pytest.mark.asyncio
async def test_idle_waits_for_the_last_frame(settle: Settle) -> None:
    """idle() returns when nothing is in flight, to everybody who waits."""
    gate = threading.Event()
    async with opened(spec(lambda x: gate.wait())) as engine:
        await engine.idle()
        owner = Owner()
        put(engine, owner, 1)
        waiting = [asyncio.create_task(engine.idle()) for _ in range(2)]
        await settle()
        assert not any(task.done() for task in waiting)
        gate.set()
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert len(owner.frames) == 1


@pytest.mark.asyncio
async def test_a_stage_task_that_dies_breaks_the_pipeline(settle: Settle) -> None:
    """A fault in a stage task itself ends everything with BrokenError: frames, requests, runs; closing still works."""
    async with Pipeline.from_stages([same, same, same]) as pipeline:
        run = pipeline.run(range(10**9))
        await anext(run)
        engine = pipeline._engine
        assert engine is not None
        request = asyncio.create_task(pipeline.submit(1))
        await settle(1)
        engine.stages[1].inbox.put_nowait(object())  # type: ignore[arg-type]
        with pytest.raises(BrokenError, match="a stage task of pipeline 'pipeline' died: AttributeError"):
            async for _ in run:
                pass
        await asyncio.wait([request])
        assert request.exception() is None or isinstance(
            request.exception(), BrokenError
        )  # or it was answered just before
        with pytest.raises(BrokenError):
            await pipeline.submit(1)
        with pytest.raises(BrokenError):
            await anext(pipeline.run(range(3)))
        assert engine.door.used == 0


@pytest.mark.asyncio
async def test_a_device_that_does_not_open_leaves_nothing(settle: Settle) -> None:
    """When the second device fails to open, the first one's threads end."""

    class Broken(CpuDevice):
        def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> Any:
            raise OSError("no such device")

    pipeline = Pipeline.from_stages([same, Stage(same, device=Broken(7))])
    for _ in range(2):
        with pytest.raises(OSError, match="no such device"):
            async with pipeline:
                pass


@pytest.mark.asyncio
async def test_stages_on_one_device_share_its_thread() -> None:
    """Stages that name the same device run on one thread, also when another lies between them."""
    threads: list[set[str]] = [set(), set(), set()]

    def stage(k: int) -> Callable[[int], int]:
        def fn(x: int) -> int:
            threads[k].add(threading.current_thread().name)
            return x

        return fn

    names = ["cpu:0", "cpu:1", "cpu:0"]
    stages = [Stage(stage(k), device=name, timeout=60.0) for k, name in enumerate(names)]  # with one none is lent
    got = [pred.index async for pred in Pipeline.from_stages(stages, depth=2).run(range(50))]
    assert got == list(range(50))
    assert threads[0] == threads[2] == {"cpu:0"}
    assert threads[1] == {"cpu:1"}


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2, 16])
@pytest.mark.parametrize("order", [("cpu:0", "inline"), ("inline", "cpu:0", "inline"), ("cpu:0", "inline", "cpu:1")])
async def test_threads_and_the_loop_side_by_side(order: tuple[str, ...], depth: int) -> None:
    """Stages on threads and on the loop follow one another in any order, at any depth."""
    stages = [Stage(lambda x: x + 1, device=name) for name in order]
    got = [pred.output async for pred in Pipeline.from_stages(stages, depth=depth).run(range(200))]
    assert got == [i + len(order) for i in range(200)]


# -------------------------------------------------------------------------------------------------- shared threads


@pytest.mark.asyncio
async def test_stages_of_microseconds_share_a_thread_and_grow_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short neighbours are put on one worker; when one becomes long it gets its own again. Order is kept throughout."""
    times = [5e-6, 5e-6, 5e-6]
    seen: list[int] = []
    threads: set[str] = set()
    busy = threading.Lock()

    def second(x: int) -> int:
        assert busy.acquire(blocking=False), "two threads in one stage"
        try:
            threads.add(threading.current_thread().name)
            seen.append(x)
            return x
        finally:
            busy.release()

    async with Pipeline.from_stages([same, second, same], depth=16) as pipeline:
        engine = pipeline._engine
        assert engine is not None
        monkeypatch.setattr(engine, "_times", lambda: times)
        streams = [stage.stream for stage in engine.stages]
        changes: list[list[int | None]] = [[None, None, None]]
        async with pipeline.run(range(10**9)) as run:
            async for pred in run:
                assert pred.output == pred.index
                now = [streams.index(s.host) if s.host else None for s in streams if isinstance(s, WorkerStream)]
                if now != changes[-1]:
                    changes.append(now)
                    times = [5e-6, 1e-3, 5e-6] if len(changes) % 2 == 0 else [5e-6, 5e-6, 5e-6]
                if len(changes) == 8:
                    break
                await asyncio.sleep(0)
        assert changes == [[None, None, None], [None, 0, 0]] * 4
        assert seen == list(range(len(seen)))
        assert threads == {"cpu:0", "cpu:1"}


@pytest.mark.parametrize(
    ("times", "before", "after"),
    [
        ((5e-6, 5e-6, 5e-6), (None, None, None), (None, 0, 0)),  # all short: all on the first
        ((5e-6, 1e-3, 5e-6), (None, None, None), (None, None, None)),  # a long one between
        ((1e-3, 5e-6, 5e-6), (None, None, None), (None, None, 1)),  # the long one stays alone
        ((5e-6, 1e-3, 5e-6), (None, 0, 0), (None, None, None)),  # it grew
        ((1e-3, 5e-6, 5e-6), (None, 0, 0), (None, None, None)),  # its host grew: nobody behind it stays there
        ((4e-5, 4e-5, 4e-5), (None, 0, 0), (None, 0, 0)),  # between the limits all stays as it is
        ((0.0, 0.0, 0.0), (None, 0, 0), (None, 0, 0)),  # nothing ran
    ],
)
@pytest.mark.asyncio
async def test_who_shares_a_thread(
    times: tuple[float, ...], before: tuple[int | None, ...], after: tuple[int | None, ...]
) -> None:
    """Neighbours under the limit share, nobody stays on a worker that is not its neighbour's, with slack between."""
    async with opened(*(spec(index=k, name=f"s{k}") for k in range(3))) as engine:
        streams = [stage.stream for stage in engine.stages]
        for stream, host in zip(streams, before, strict=True):
            assert isinstance(stream, WorkerStream)
            lender = streams[host] if host is not None else None
            assert lender is None or isinstance(lender, WorkerStream)
            stream.lend(lender)
        engine._share_threads(list(times))
        found = [streams.index(s.host) if isinstance(s, WorkerStream) and s.host is not None else None for s in streams]
        assert tuple(found) == after


# ------------------------------------------------------------------------------------------------------- time-outs


@pytest.mark.asyncio
@pytest.mark.may_block
async def test_a_stage_that_hangs_is_given_up_in_order(settle: Settle) -> None:
    """A frame that hangs fails in its turn, those behind it work on a new thread, which is all that remains."""
    gate, hung = threading.Event(), []

    def fn(x: int) -> int:
        if x == 3:
            hung.append(threading.current_thread())
            gate.wait()
        return x

    try:
        errors: list[AiotimeError] = []
        async with Pipeline.from_stages([Stage(fn, name="hangs", timeout=0.05), same], depth=3) as pipeline:
            run = pipeline.run(range(10), on_error=lambda frame, error: errors.append(error))
            assert [pred.index async for pred in run] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
            assert [type(error) for error in errors] == [StageTimeout]
            assert "'hangs' took longer than 0.05 s at frame 3" in str(errors[0])
            assert hung[0].is_alive()
            stage = pipeline.stats().stages[0]
            assert (stage.frames, stage.failed) == (10, 1)
            gate.set()
    finally:
        gate.set()
    assert not hung[0].is_alive()


@pytest.mark.asyncio
async def test_a_stage_that_hangs_does_not_hold_up_closing(settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out is kept while the pipeline closes; the thread ends when its function does."""
    monkeypatch.setattr("aiotime.devices.worker.GRACE", 0.0)
    gate, inside = threading.Event(), threading.Event()

    def fn(x: int) -> None:
        inside.set()
        gate.wait()

    try:
        async with Pipeline.from_stages([Stage(fn, timeout=0.05)]) as pipeline:
            answer = asyncio.create_task(pipeline.submit(1))
            await settle(until=inside.is_set)
        assert not gate.is_set()
        with pytest.raises((ClosedError, StageTimeout)):
            await answer
    finally:
        gate.set()


# --------------------------------------------------------------------------------------------------- statistics


@pytest.mark.asyncio
async def test_busy_shares_and_bottleneck_are_exact_in_virtual_time() -> None:
    """Over a filled pipeline each stage is busy its share of the slowest stage's time, which is the bottleneck."""
    clock = VirtualClock()
    seconds = (1.0, 4.0, 2.0)
    stages = [
        Stage(same, device=SimulatedDevice(k, seconds=s, clock=clock), name=f"s{k}") for k, s in enumerate(seconds)
    ]
    async with Pipeline.from_stages(stages, depth=2) as pipeline:
        _ = [pred async for pred in pipeline.run(range(100))]
        stats = pipeline.stats()
    assert stats.elapsed == 7.0 + 99 * 4.0
    assert [stage.busy for stage in stats.stages] == pytest.approx([s * 100 / stats.elapsed for s in seconds])
    assert [stage.service_p50 for stage in stats.stages] == list(seconds)
    assert [stage.frames for stage in stats.stages] == [100] * 3
    assert stats.bottleneck == "s1"
    assert (stats.frames_in, stats.frames_out, stats.in_flight, stats.waiting) == (100, 100, 0, 0)
    assert stats.latency_p50 > 7.0


@pytest.mark.asyncio
async def test_the_slices_of_a_trace_are_the_jobs() -> None:
    """While a trace is recorded every job is a slice on its device's lane."""

    class Tracer:
        slices: list[tuple[str, str, int | None]] = []

        def slice(self, lane: str, name: str, start: float, end: float, frame: int | None = None) -> None:
            self.slices.append((lane, name, frame))

        def instant(self, lane: str, name: str, at: float, frame: int | None = None) -> None: ...

        def counter(self, name: str, at: float, value: float) -> None: ...

    async with opened(spec(name="a"), StageSpec("b", same, InlineDevice())) as engine:
        engine.trace_into(Tracer())
        owner = Owner()
        put(engine, owner, 1, 7)
        await engine.idle()
        engine.trace_into(None)
        put(engine, owner, 1, 8)
        await engine.idle()
    assert ("cpu:0", "a", 7) in Tracer.slices
    assert ("inline", "b", 7) in Tracer.slices
    assert not [entry for entry in Tracer.slices if entry[2] == 8]
