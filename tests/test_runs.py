"""Tests of aiotime.runs: order, errors in their turn, deadlines, overflow, failure budgets, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from aiotime import Pipeline, Run, Sample, SimulatedDevice, Stage, VirtualClock
from aiotime.errors import (
    BusyError,
    ClosedError,
    ConfigurationError,
    DeadlineExceeded,
    FailureBudgetExceeded,
    FrameCancelled,
    FrameError,
    FrameShed,
    InputError,
    SourceError,
    StageError,
)
from aiotime.frame import Frame
from aiotime.ingest import pull as pull_module

if TYPE_CHECKING:
    from tests.conftest import Settle

FOREVER = 10**9


def same(x: Any) -> Any:
    return x


def noting(log: list[Any]) -> Callable[[Any], Any]:
    """A stage's function that writes down what it computes."""

    def fn(x: Any) -> Any:
        log.append(x)
        return x

    return fn


def plus(x: int) -> int:
    return x + 1


def bad_at(*values: int) -> Callable[[int], int]:
    def bad(x: int) -> int:
        if x in values:
            raise ValueError(f"boom {x}")
        return x

    return bad


class Tape:
    """An async source that knows what was taken from it and whether it was closed; ``acks`` counts acknowledgements."""

    def __init__(self, items: int = FOREVER, *, error: Exception | None = None, key: Any = None) -> None:
        self.items, self.error, self.key = items, error, key
        self.taken = 0
        self.closed = 0
        self.acks: dict[int, list[BaseException | None]] = {}

    async def __aiter__(self) -> AsyncIterator[Sample]:
        try:
            while self.taken < self.items:
                i = self.taken
                self.taken += 1
                self.acks[i] = []
                yield Sample(i, key=self.key, ack=self.acks[i].append)
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1

    @property
    def outcomes(self) -> Counter[str]:
        """How often each outcome was acknowledged; fails unless each frame has exactly one."""
        assert all(len(acks) == 1 for acks in self.acks.values()), self.acks
        return Counter(type(acks[0]).__name__ for acks in self.acks.values())


def gone(pipeline: Pipeline) -> bool:
    """Nothing is left of any run: no credit, no frame, nobody at the door."""
    engine = pipeline._engine
    return engine is None or not (
        engine.door.used or engine.door.used_bytes or engine.frames or engine.door.full or engine.runs
    )


def adds_up(run: Run) -> bool:
    stats = run.stats()
    return stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed


@contextlib.contextmanager
def gates(count: int = 1) -> Iterator[list[threading.Event]]:
    """Gates that are open at the end, so that no thread stays behind one."""
    made = [threading.Event() for _ in range(count)]
    try:
        yield made
    finally:
        for gate in made:
            gate.set()


def virtual(*seconds: float, clock: VirtualClock | None = None, **options: Any) -> tuple[Pipeline, VirtualClock]:
    clock = clock or VirtualClock()
    stages = [
        Stage(same, device=SimulatedDevice(k, seconds=s, clock=clock), name=f"s{k}") for k, s in enumerate(seconds)
    ]
    return Pipeline.from_stages(stages, **{"depth": 2, **options}), clock


# --------------------------------------------------------------------------------------------------------- order


@pytest.mark.asyncio
async def test_order_out_is_order_in() -> None:
    """Predictions come in the order of the source, with index, key and latency."""
    tape = Tape(300, key="camera")
    run = Pipeline.from_stages([plus, Stage(plus, workers=4), plus]).run(tape)
    preds = [pred async for pred in run]
    assert [(p.index, p.output, p.key, p.dropped_before) for p in preds] == [
        (i, i + 3, "camera", 0) for i in range(300)
    ]
    assert all(p.latency > 0 for p in preds)
    assert tape.outcomes == {"NoneType": 300}
    assert (tape.closed, adds_up(run)) == (1, True)


@pytest.mark.asyncio
async def test_several_runs_at_once_each_in_its_order() -> None:
    """Runs share the stages; each gets its own frames in its own order."""
    async with Pipeline.from_stages([plus, Stage(plus, workers=3)]) as pipeline:

        async def consume(start: int) -> list[int]:
            return [pred.output async for pred in pipeline.run(range(start, start + 100))]

        got = await asyncio.gather(*(consume(1000 * k) for k in range(5)))
        assert got == [list(range(1000 * k + 2, 1000 * k + 102)) for k in range(5)]
        assert gone(pipeline)


@pytest.mark.asyncio
async def test_run_alone_opens_and_closes() -> None:
    """Without ``async with`` a run opens the pipeline and the last one to end closes it; it can be used again."""
    pipeline = Pipeline.from_stages([same])
    for _ in range(3):
        assert [pred.output async for pred in pipeline.run(range(5))] == [0, 1, 2, 3, 4]
        assert pipeline._engine is None


@pytest.mark.asyncio
async def test_an_empty_source() -> None:
    """A source without frames is a run without predictions."""
    assert [pred async for pred in Pipeline.from_stages([same]).run([])] == []


@pytest.mark.asyncio
async def test_in_flight_stays_within_depth_times_stages(settle: Settle) -> None:
    """However fast the source, no more than depth x stages frames are in the pipeline, and no more are pulled ahead."""
    inside, most = [0], [0]
    lock = threading.Lock()

    def enter(x: int) -> int:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        return x

    def leave(x: int) -> int:
        with lock:
            inside[0] -= 1
        return x

    tape = Tape(500)
    async with Pipeline.from_stages([enter, same, leave], depth=2) as pipeline:
        async with pipeline.run(tape) as run:
            async for pred in run:
                assert tape.taken <= pred.index + 2 * 6 + 2
        assert most[0] <= 6
        assert tape.taken == 500


@pytest.mark.asyncio
async def test_frames_are_pulled_no_further_than_admitted(settle: Settle) -> None:
    """With nobody reading, the source is asked for a window of frames and one that waits at the door."""
    tape = Tape()
    async with Pipeline.from_stages([same, same], depth=3) as pipeline, pipeline.run(tape, window=4) as run:
        await settle(300)
        assert tape.taken == 5
        assert (await anext(run)).index == 0
        await settle(300)
        assert tape.taken == 6
    assert tape.outcomes == {"NoneType": 1, "FrameCancelled": 5}


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.asyncio
async def test_a_stage_error_is_raised_in_its_turn() -> None:
    """The frames before a failed one are delivered, then its error, with stage and frame; the run has ended."""
    tape = Tape()
    async with Pipeline.from_stages([plus, Stage(bad_at(7), name="bad", workers=2), plus]) as pipeline:
        run = pipeline.run(tape)
        got = []
        with pytest.raises(StageError, match="stage 'bad' failed at frame 6: ValueError: boom 7") as caught:
            async for pred in run:
                got.append(pred.index)  # noqa: PERF401 - what came before the error matters
        assert got == list(range(6))
        assert (caught.value.stage, caught.value.frame) == ("bad", 6)
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(StopAsyncIteration):
            await anext(run)
        assert gone(pipeline)
        assert (await pipeline.submit(1)).output == 3  # the others go on
        assert adds_up(run)
    outcomes = tape.outcomes
    assert (outcomes["NoneType"], outcomes["StageError"], tape.closed) == (6, 1, 1)
    assert set(outcomes) == {"NoneType", "StageError", "FrameCancelled"}


@pytest.mark.asyncio
async def test_skip_leaves_failed_frames_out() -> None:
    """With skip a failed frame is missing, counted, told to its ack, and not computed by the stages behind."""
    ran: list[int] = []
    tape = Tape(99)
    run = Pipeline.from_stages([same, bad_at(*range(0, 99, 3)), noting(ran)]).run(tape, on_error="skip")
    preds = [pred async for pred in run]
    assert [p.index for p in preds] == ran == [i for i in range(99) if i % 3]
    assert [p.dropped_before for p in preds] == [1, 0] * 33
    stats = run.stats()
    assert (stats.frames_in, stats.frames_out, stats.frames_failed, stats.frames_shed) == (99, 66, 33, 0)
    assert tape.outcomes == {"NoneType": 66, "StageError": 33}


@pytest.mark.asyncio
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_dead_letters(asynchronous: bool) -> None:
    """A callable gets each failed frame with its input and key, and its error, in order."""
    letters: list[tuple[Any, Any, str | None]] = []

    def plain(frame: Frame, error: FrameError) -> None:
        letters.append((frame.input, frame.key, error.stage))

    async def slow(frame: Frame, error: FrameError) -> None:
        await asyncio.sleep(0)
        plain(frame, error)

    run = Pipeline.from_stages([plus, Stage(bad_at(3, 5), name="bad")]).run(
        Tape(6, key="k"), on_error=slow if asynchronous else plain
    )
    assert [pred.index async for pred in run] == [0, 1, 3, 5]
    assert letters == [(2, "k", "bad"), (4, "k", "bad")]


@pytest.mark.asyncio
async def test_a_dead_letter_callable_that_fails_ends_the_run() -> None:
    """An error in the user's callable is raised from the iteration; nothing is left."""

    def broken(frame: Frame, error: FrameError) -> None:
        raise KeyError("no letter box")

    tape = Tape()
    async with Pipeline.from_stages([bad_at(3)]) as pipeline:
        run = pipeline.run(tape, on_error=broken)
        with pytest.raises(KeyError, match="letter box"):
            async for _ in run:
                pass
        assert gone(pipeline)
        assert adds_up(run)
    assert tape.outcomes["StageError"] == 1


@pytest.mark.asyncio
async def test_a_stage_has_the_last_word() -> None:
    """A stage's on_error goes before the run's: skip under a run that raises, raise under one that skips."""
    letters: list[int] = []

    def letter(frame: Frame, error: FrameError) -> None:
        letters.append(frame.input)

    stages = [
        Stage(bad_at(1), name="skips", on_error="skip"),
        Stage(bad_at(2), name="raises", on_error="raise"),
        Stage(bad_at(3), name="writes", on_error=letter),
    ]
    assert [p.index async for p in Pipeline.from_stages(stages).run([0, 1, 3, 4])] == [0, 3]
    assert letters == [3]
    with pytest.raises(StageError, match="raises"):
        async for _ in Pipeline.from_stages(stages).run(range(4), on_error="skip"):
            pass


@pytest.mark.asyncio
@pytest.mark.parametrize(("budget", "ends_at"), [(2, 3), (0, 1), (0.0, 1), (0.5, None), (0.2, 4)])
async def test_failure_budget(budget: float, ends_at: int | None) -> None:
    """More failures than a count, or a larger share than allowed once it can be told, end a run that skips."""
    # frames 2, 4, 6, 8 of 0..9 fail
    tape = Tape(10)
    run = Pipeline.from_stages([bad_at(2, 4, 6, 8)]).run(tape, on_error="skip", failure_budget=budget)
    if ends_at is None:
        assert [pred.index async for pred in run] == [0, 1, 3, 5, 7, 9]
        return
    got = []
    with pytest.raises(FailureBudgetExceeded, match="more frames failed than the budget") as caught:
        async for pred in run:
            got.append(pred.index)  # noqa: PERF401 - what came before the error matters
    assert isinstance(caught.value.__cause__, StageError)
    assert caught.value.__cause__.frame == {1: 2, 3: 6, 4: 4}[ends_at]
    assert adds_up(run)
    assert tape.outcomes["StageError"] >= 1


@pytest.mark.asyncio
async def test_a_source_error_comes_after_its_frames() -> None:
    """What the source raises is raised as SourceError behind the frames it gave."""
    tape = Tape(5, error=KeyError("unplugged"))
    run = Pipeline.from_stages([same, same]).run(tape)
    got = []
    with pytest.raises(SourceError, match="after 5 frames: KeyError: 'unplugged'") as caught:
        async for pred in run:
            got.append(pred.index)  # noqa: PERF401 - what came before the error matters
    assert got == list(range(5))
    assert isinstance(caught.value.__cause__, KeyError)
    assert tape.outcomes == {"NoneType": 5}


@pytest.mark.asyncio
async def test_a_cancelled_source_is_not_the_end_of_the_stream() -> None:
    """A source in which something was cancelled by others has failed; it must not look like a source that ended."""

    async def source() -> AsyncIterator[int]:
        yield 1
        waiting = asyncio.get_running_loop().create_future()
        waiting.cancel()
        await waiting

    got = []
    with pytest.raises(SourceError, match="cancelled after 1 frames"):
        async for pred in Pipeline.from_stages([same]).run(source()):
            got.append(pred.index)  # noqa: PERF401 - what came before the error matters
    assert got == [0]


@pytest.mark.asyncio
async def test_what_is_no_source_is_a_configuration_error() -> None:
    """A wrong source is told as such, not as one that failed."""
    run = Pipeline.from_stages([same]).run("clip.mp4")
    with pytest.raises(ConfigurationError, match=r"aiotime\.sources"):
        await anext(run)


@pytest.mark.asyncio
async def test_a_source_that_fails_to_close_is_told() -> None:
    """An error in the source's cleaning up after its last frame is raised at the end."""

    class Camera:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Camera:
            return self

        async def __anext__(self) -> int:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return self.left

        async def aclose(self) -> None:
            raise OSError("cannot release")

    got = []
    with pytest.raises(SourceError, match="cannot release"):
        async for pred in Pipeline.from_stages([same]).run(Camera()):
            got.append(pred.output)  # noqa: PERF401 - what came before the error matters
    assert got == [2, 1, 0]


@pytest.mark.asyncio
async def test_an_ack_that_raises_disturbs_nobody(loop_errors: list[dict[str, Any]]) -> None:
    """An error in an ack goes to the loop's exception handler, and the stream goes on."""

    def broken(error: BaseException | None) -> None:
        raise KeyError("broker")

    run = Pipeline.from_stages([same]).run([Sample(i, ack=broken) for i in range(3)])
    assert [pred.index async for pred in run] == [0, 1, 2]
    assert len(loop_errors) == 3
    assert all("ack of frame" in context["message"] for context in loop_errors)
    loop_errors.clear()


# ----------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.asyncio
async def test_late_frames_are_shed_before_they_are_computed() -> None:
    """On a stage of one second with a budget of five, frames wait four seconds: those that cannot make it are shed."""
    ran: list[int] = []
    clock = VirtualClock()
    stage = Stage(noting(ran), device=SimulatedDevice(0, seconds=1.0, clock=clock))
    tape = Tape(10)
    run = Pipeline.from_stages([stage], depth=5, budget=5).run(tape, deadline=2.5)
    got = [pred.index async for pred in run]
    stats = run.stats()
    assert got == ran
    assert got[:3] == [0, 1, 2]
    assert 0 < stats.frames_shed == 10 - len(got)
    assert adds_up(run)
    assert tape.outcomes == {"NoneType": len(got), "DeadlineExceeded": 10 - len(got)}


@pytest.mark.asyncio
async def test_a_sample_has_its_own_deadline() -> None:
    """A Sample's deadline goes before the run's, both ways."""
    pipeline, _ = virtual(1.0, depth=4, budget=4)
    samples = [Sample(0), Sample(1, deadline=0.5), Sample(2, deadline=9.0), Sample(3)]
    run = pipeline.run(samples, deadline=1.5)
    assert [pred.index async for pred in run] == [0, 2]


@pytest.mark.asyncio
async def test_a_frame_that_expires_at_the_door_never_enters() -> None:
    """A deadline that passes while a frame waits for a credit sheds it at the door."""
    pipeline, _ = virtual(1.0, budget=1)
    tape = Tape(6)
    run = pipeline.run(tape, deadline=0.5, overflow="drop_oldest", window=6)
    assert [pred.index async for pred in run] == [0]
    assert tape.outcomes == {"NoneType": 1, "DeadlineExceeded": 5}
    assert adds_up(run)


@pytest.mark.asyncio
async def test_an_expired_frame_gives_its_place_to_none_that_is_larger() -> None:
    """When a frame expires at the door, the one behind it enters only if its own bytes fit."""
    clock = VirtualClock()
    most: list[int] = []

    def weigh(x: np.ndarray[Any, Any]) -> int:
        assert pipeline._engine is not None
        most.append(pipeline._engine.door.used_bytes)
        return x.nbytes

    stage = Stage(weigh, device=SimulatedDevice(0, seconds=1.0, clock=clock))
    pipeline = Pipeline.from_stages([stage], depth=9, budget=9, budget_bytes=100)
    deadlines = {30: 0.5}
    samples = [Sample(np.zeros(n, dtype=np.uint8), deadline=deadlines.get(n)) for n in (40, 40, 30, 90)]
    run = pipeline.run(samples, overflow="drop_oldest", window=9)
    assert [pred.output async for pred in run] == [40, 40, 90]
    assert most == [80, 40, 90]
    assert clock.now() == 3.0


@pytest.mark.asyncio
@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf")])
async def test_deadlines_are_positive(deadline: float) -> None:
    """A deadline that has always passed, or never will, is refused."""
    with pytest.raises(ConfigurationError, match="positive number of seconds"):
        Pipeline.from_stages([same]).run([], deadline=deadline)


# ------------------------------------------------------------------------------------------------------ overflow


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("overflow", "expected"),
    [("drop_oldest", [0, 1, 2, 17, 18, 19]), ("drop_newest", [0, 1, 2, 3, 4, 5]), ("latest", [0, 1, 2, 19])],
)
async def test_overflow_at_the_door(settle: Settle, overflow: Any, expected: list[int]) -> None:
    """A source that does not wait: three frames in the window, the policy decides which of the rest stay."""
    tape = Tape(20)
    with gates() as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x + 100], budget=3) as pipeline:
            run = pipeline.run(tape, overflow=overflow, window=3)
            async with run:
                await settle(until=lambda: tape.closed)
                await settle()
                gate.set()
                preds = [pred async for pred in run]
            assert [p.index for p in preds] == expected
            assert [p.output for p in preds] == [i + 100 for i in expected]
            gaps = [b - a - 1 for a, b in zip([-1, *expected], expected, strict=False)]
            assert [p.dropped_before for p in preds] == gaps
            assert run.stats().frames_shed == 20 - len(expected)
            assert gone(pipeline)
    assert tape.outcomes == {"NoneType": len(expected), "FrameShed": 20 - len(expected)}


@pytest.mark.asyncio
async def test_latest_is_decided_with_the_credit_in_hand(settle: Settle) -> None:
    """The frame that enters is the newest at the moment there is room, not at the moment it began to wait."""
    feed: asyncio.Queue[int] = asyncio.Queue()

    async def source() -> AsyncIterator[int]:
        while (item := await feed.get()) >= 0:
            yield item

    with gates(2) as [first, second]:
        ran: list[int] = []

        def gated(x: int) -> int:
            ran.append(x)
            (first if x == 0 else second).wait()
            return x

        async with (
            Pipeline.from_stages([gated], budget=1) as pipeline,
            pipeline.run(source(), overflow="latest") as run,
        ):
            for i in range(5):
                feed.put_nowait(i)
                await settle()
            first.set()
            assert (await anext(run)).index == 0
            await settle(until=lambda: len(ran) == 2)
            assert ran == [0, 4]
            feed.put_nowait(-1)
            second.set()
            assert [pred.index async for pred in run] == [4]


@pytest.mark.asyncio
@pytest.mark.parametrize("overflow", ["latest", "drop_oldest", "drop_newest"])
async def test_a_source_that_never_waits_does_not_starve_the_loop(overflow: Any) -> None:
    """Beside a source that is always ready and a policy that never waits, other tasks get their turns."""

    async def hot() -> AsyncIterator[int]:
        i = 0
        while True:
            yield i
            i += 1

    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with Pipeline.from_stages([same]) as pipeline:
        task = asyncio.create_task(other())
        async with pipeline.run(hot(), overflow=overflow) as run:
            async for pred in run:
                if pred.index > 100:
                    break
        task.cancel()
        await asyncio.wait([task])
        assert turns > 10
        assert gone(pipeline)


# -------------------------------------------------------------------------------------------------- ways to end


@pytest.mark.asyncio
async def test_break_inside_async_with() -> None:
    """Leaving a run closes its source, returns its credits and acknowledges every frame; counts add up."""
    tape = Tape()
    async with Pipeline.from_stages([same, same]) as pipeline:
        async with pipeline.run(tape) as run:
            async for pred in run:
                if pred.index == 50:
                    break
        assert gone(pipeline)
        assert tape.closed == 1
        assert adds_up(run)
        stats = pipeline.stats()
        assert stats.frames_in == stats.frames_out + stats.frames_shed + stats.frames_failed
    assert set(tape.outcomes) == {"NoneType", "FrameCancelled"}


@pytest.mark.asyncio
async def test_a_run_that_is_dropped_warns_and_is_cleaned_up(settle: Settle) -> None:
    """Breaking out without closing warns and still ends every task, as soon as nobody holds the run."""
    tape = Tape()
    async with Pipeline.from_stages([same]) as pipeline:

        async def careless() -> None:
            async for pred in pipeline.run(tape):
                if pred.index == 5:
                    break

        with pytest.warns(ResourceWarning, match=r"async with pipeline\.run"):
            await careless()
        await settle(until=lambda: gone(pipeline))
    assert tape.closed == 1
    assert set(tape.outcomes) == {"NoneType", "FrameCancelled"}


@pytest.mark.asyncio
async def test_a_run_never_started_is_nothing() -> None:
    """Making, closing or dropping a run that was never awaited neither opens the pipeline nor warns."""
    pipeline = Pipeline.from_stages([same])
    pipeline.run(Tape())
    run = pipeline.run(Tape())
    await run.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(run)
    with pytest.raises(ClosedError):
        async with run:
            pass
    assert pipeline._engine is None


@pytest.mark.asyncio
async def test_cancelling_the_consumer_takes_no_prediction_away(settle: Settle) -> None:
    """A consumer that is cancelled while it waits may go on with the very next frame."""
    with gates() as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x + 1]) as pipeline:
            async with pipeline.run(range(5)) as run:
                for _ in range(10):
                    waiting = asyncio.ensure_future(anext(run))
                    await settle(5)
                    waiting.cancel()
                    await asyncio.wait([waiting])
                gate.set()
                assert [pred.output async for pred in run] == [1, 2, 3, 4, 5]
            assert gone(pipeline)


@pytest.mark.asyncio
async def test_cancelling_during_a_dead_letter_leaves_the_run_alive(settle: Settle) -> None:
    """A consumer that is cancelled inside its own callable may go on behind the failed frame."""
    inside = asyncio.Event()

    async def letter(frame: Frame, error: FrameError) -> None:
        inside.set()
        await asyncio.get_running_loop().create_future()

    async with Pipeline.from_stages([bad_at(1)]) as pipeline, pipeline.run(range(4), on_error=letter) as run:
        assert (await anext(run)).index == 0
        waiting = asyncio.ensure_future(anext(run))
        await inside.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert [pred.index async for pred in run] == [2, 3]
        assert adds_up(run)


@pytest.mark.asyncio
async def test_an_error_survives_the_cancelling_of_its_consumer(settle: Settle) -> None:
    """A consumer cancelled while a failed run is being wound up gets the error with its next call."""
    closing, release = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            for i in range(FOREVER):
                yield i
        finally:
            closing.set()
            await release.wait()

    async with Pipeline.from_stages([bad_at(0)]) as pipeline:
        run = pipeline.run(source())
        waiting = asyncio.ensure_future(anext(run))
        await closing.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        release.set()
        with pytest.raises(StageError, match="boom 0"):
            await anext(run)
        with pytest.raises(StopAsyncIteration):
            await anext(run)
        await run.aclose()
        assert gone(pipeline)


@pytest.mark.asyncio
async def test_aclose_from_another_task_ends_the_iteration(settle: Settle) -> None:
    """A consumer that waits in a run which somebody else closes sees the end, not an error."""

    async def idle() -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    async with Pipeline.from_stages([same]) as pipeline:
        run = pipeline.run(idle())

        async def consume() -> list[int]:
            return [pred.output async for pred in run]

        task = asyncio.create_task(consume())
        await settle(until=lambda: run.stats().frames_out == 1)
        await asyncio.gather(run.aclose(), run.aclose())
        assert await task == [1]
        await run.aclose()
        assert gone(pipeline)


@pytest.mark.asyncio
async def test_aclose_waits_for_jobs_that_run(settle: Settle) -> None:
    """Closing a run passes over its queued work and waits for the job a thread is in."""
    ran: list[int] = []
    with gates() as [gate]:

        def gated(x: int) -> int:
            ran.append(x)
            gate.wait()
            return x

        async with Pipeline.from_stages([gated], depth=4) as pipeline:
            run = pipeline.run(range(100))
            async with run:
                await settle(until=lambda: ran)
                closing = asyncio.create_task(run.aclose())
                await settle()
                assert not closing.done()
                gate.set()
                await closing
            assert ran == [0]
            assert gone(pipeline)


@pytest.mark.asyncio
async def test_the_pipeline_closes_under_a_run(settle: Settle) -> None:
    """Frames that were done are delivered, then ClosedError; the source is closed and every frame acknowledged."""
    tape = Tape()
    with gates() as [gate]:
        pipeline = Pipeline.from_stages([lambda x: x < 3 or gate.wait()], depth=8)
        async with pipeline:
            run = pipeline.run(tape)
            got = [(await anext(run)).index for _ in range(2)]
            await settle(until=lambda: pipeline.stats().in_flight >= 2)
            closing = asyncio.create_task(pipeline.aclose())
            await settle()
            gate.set()
            await closing
        with pytest.raises(ClosedError, match="was closed"):
            async for pred in run:
                got.append(pred.index)  # noqa: PERF401 - what came before the error matters
        assert got == list(range(len(got)))
        assert len(got) >= 2
    assert tape.closed == 1
    assert sum(tape.outcomes.values()) == tape.taken
    assert adds_up(run)


@pytest.mark.asyncio
async def test_the_pipeline_closes_under_an_idle_run(settle: Settle) -> None:
    """A consumer that waits for a silent source is told when the pipeline closes, and the source is closed."""
    tape: list[str] = []

    async def idle() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.get_running_loop().create_future()
        finally:
            tape.append("closed")

    pipeline = Pipeline.from_stages([same])
    async with pipeline:
        watched, unwatched = pipeline.run(idle()), pipeline.run(idle())
        await anext(watched)
        await anext(unwatched)
        waiting = asyncio.ensure_future(anext(watched))
        await settle()
    with pytest.raises(ClosedError, match="was closed"):
        await waiting
    await settle()
    assert tape == ["closed", "closed"]  # also where nobody was looking
    await unwatched.aclose()


@pytest.mark.asyncio
async def test_closing_a_pipeline_behind_a_finished_source_loses_nothing(settle: Settle) -> None:
    """A run whose frames are all done delivers them after the pipeline has closed, and ends normally."""
    pipeline = Pipeline.from_stages([same], budget=10)
    async with pipeline:
        run = pipeline.run(range(5))
        assert (await anext(run)).index == 0
        await settle(until=lambda: pipeline.stats().in_flight == 0 and run._state.ended)
    assert [pred.index async for pred in run] == [1, 2, 3, 4]


@pytest.mark.asyncio
async def test_leaving_while_waiting_at_the_door(settle: Settle) -> None:
    """A run that is closed while it waits for a credit waits there no more."""
    tape = Tape()
    async with Pipeline.from_stages([same]) as pipeline:
        pipeline.pause()
        async with pipeline.run(tape):
            await settle()
            assert pipeline.stats().waiting == 1
        assert pipeline.stats().waiting == 0
        assert gone(pipeline)
    assert tape.outcomes == {"FrameCancelled": 1}


@pytest.mark.asyncio
async def test_stop_delivers_what_is_in_flight(settle: Settle) -> None:
    """After stop() nothing more is pulled; the frames already pulled come out, then the run ends normally."""
    tape = Tape()
    async with Pipeline.from_stages([same, same], depth=3) as pipeline:
        run = pipeline.run(tape)
        assert (await anext(run)).index == 0
        await run.stop()
        await run.stop()
        taken = tape.taken
        assert [pred.index async for pred in run] == list(range(1, taken))
        assert (tape.taken, tape.closed) == (taken, 1)
        assert gone(pipeline)
    assert tape.outcomes == {"NoneType": taken}


@pytest.mark.asyncio
async def test_a_source_may_take_its_time_to_clean_up(settle: Settle) -> None:
    """The source's own ``finally`` is not cut short when a stopped run comes to its end."""
    log: list[str] = []
    released = asyncio.Event()

    async def camera() -> AsyncIterator[int]:
        try:
            for i in range(FOREVER):
                yield i
        finally:
            await released.wait()
            log.append("released")

    async with Pipeline.from_stages([same]) as pipeline:
        run = pipeline.run(camera())
        await anext(run)
        await run.stop()

        async def rest() -> int:
            return len([pred async for pred in run])

        task = asyncio.create_task(rest())
        await settle()
        assert not task.done()
        released.set()
        await task
        assert log == ["released"]


@pytest.mark.asyncio
async def test_a_blocking_source_that_never_returns_does_not_hold_up_aclose(
    monkeypatch: pytest.MonkeyPatch, settle: Settle
) -> None:
    """aclose leaves a source that is stuck in next() to its daemon thread."""
    monkeypatch.setattr(pull_module, "PATIENCE", 0.01)
    with gates() as [gate]:
        inside = threading.Event()

        def stuck() -> Iterator[int]:
            yield 1
            inside.set()
            gate.wait()

        async with Pipeline.from_stages([same]) as pipeline:
            async with pipeline.run(stuck()) as run:
                await anext(run)
                await settle(until=inside.is_set)
            assert gone(pipeline)
    await settle(until=lambda: not any(t.name == "aiotime-source" for t in threading.enumerate()))


@pytest.mark.asyncio
async def test_a_generator_is_closed_on_its_thread_at_a_break() -> None:
    """Breaking out runs a blocking generator's ``finally`` on the thread of its body."""
    threads: list[threading.Thread] = []

    def camera() -> Iterator[int]:
        threads.append(threading.current_thread())
        try:
            yield from range(FOREVER)
        finally:
            threads.append(threading.current_thread())

    async with Pipeline.from_stages([same]).run(camera()) as run:
        async for pred in run:
            if pred.index == 10:
                break
    assert threads[0] is threads[1] is not threading.current_thread()


def test_a_run_left_behind_by_asyncio_run(caplog: pytest.LogCaptureFixture) -> None:
    """A script that ends in the middle of a run ends cleanly, and the pipeline works in the next one."""
    pipeline = Pipeline.from_stages([same, same])
    tapes = [Tape(), Tape()]

    async def leave(tape: Tape) -> Run:
        run = pipeline.run(tape)
        await anext(run)
        return run

    async def whole() -> list[int]:
        return [pred.index async for pred in pipeline.run(range(5))]

    runs = [asyncio.run(leave(tape)) for tape in tapes]
    assert asyncio.run(whole()) == [0, 1, 2, 3, 4]
    assert pipeline._engine is None  # the leases of loops that are gone do not keep it open
    assert [tape.closed for tape in tapes] == [1, 1]
    del runs
    gc.collect()
    assert caplog.records == []


# --------------------------------------------------------------------------------------------------- many users


@pytest.mark.asyncio
async def test_two_tasks_in_one_run_are_refused(settle: Settle) -> None:
    """A second task that iterates a run while the first waits gets BusyError; the first goes on."""
    with gates() as [gate]:
        async with Pipeline.from_stages([lambda x: gate.wait() and x]) as pipeline, pipeline.run([1]) as run:
            first = asyncio.ensure_future(anext(run))
            await settle()
            with pytest.raises(BusyError, match="another task"):
                await anext(run)
            gate.set()
            assert (await first).output == 1


@pytest.mark.asyncio
async def test_a_stuck_consumer_does_not_block_others(settle: Settle) -> None:
    """A run that nobody reads holds its window and no credits: requests, other runs and draining go on."""
    async with Pipeline.from_stages([same]) as pipeline:
        async with pipeline.run(Tape()) as stuck:
            await settle(until=lambda: stuck.stats().window > 1 and pipeline.stats().in_flight == 0)
            assert (await pipeline.submit(1)).output == 1
            assert [pred.index async for pred in pipeline.run(range(20))] == list(range(20))
            await asyncio.wait_for(pipeline.drain(), 10)
        assert gone(pipeline)


@pytest.mark.asyncio
async def test_idle_sources_hold_no_credit() -> None:
    """Ten cameras that are silent leave a budget of three to a request."""

    async def camera() -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    async with Pipeline.from_stages([same], budget=3) as pipeline, contextlib.AsyncExitStack() as stack:
        for _ in range(10):
            await anext(await stack.enter_async_context(pipeline.run(camera())))
        assert (await asyncio.wait_for(pipeline.submit(5), 10)).output == 5


@pytest.mark.asyncio
async def test_a_run_and_many_requests_take_turns() -> None:
    """Beside 300 queued requests a run of 50 gets every second credit."""
    async with virtual(1.0, depth=2)[0] as pipeline:
        answers = [asyncio.create_task(pipeline.submit(i)) for i in range(300)]
        await asyncio.sleep(0)
        assert len([pred async for pred in pipeline.run(range(50))]) == 50
        assert sum(task.done() for task in answers) <= 60
        assert [pred.output for pred in await asyncio.gather(*answers)] == list(range(300))


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "newest"}, "overflow must be one of"),
        ({"on_error": "ignore"}, "on_error must be"),
        ({"on_error": None}, "on_error must be"),
        ({"window": 0}, "window must be at least 1"),
        ({"failure_budget": -1}, "not negative"),
        ({"failure_budget": 1.5}, "for a count use an int"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    """What cannot work is refused where it is written, before anything runs."""
    with pytest.raises(ConfigurationError, match=message):
        Pipeline.from_stages([same]).run([], **options)


@pytest.mark.asyncio
async def test_stats_of_a_run() -> None:
    """A run counts its own frames; a latency lasts from the frame's arrival at the door to its result."""
    pipeline, _ = virtual(2.0, 3.0, depth=1, budget=1)
    run = pipeline.run(range(4))
    assert run.stats().elapsed == 0.0
    async for _ in run:
        pass
    stats = run.stats()
    assert (stats.frames_in, stats.frames_out, stats.window, stats.latency_p50) == (4, 4, 0, 10.0)
    assert stats.elapsed == 20.0


def test_the_errors_here_are_of_one_tree() -> None:
    """What can be a frame's end is a FrameError; shedding is told apart from failing."""
    for error in (InputError, StageError, FrameShed, DeadlineExceeded, FrameCancelled):
        assert issubclass(error, FrameError)
    assert not issubclass(StageError, FrameShed)
