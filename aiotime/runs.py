"""One stream through a pipeline: Run, what the user holds, and RunState, what the tasks hold.

    source ─ feed task ─▶ [hold: overflow policy] ─ credit ─▶ window (in order) ─▶ async for pred in run

Order is the window's: frames stand in it as they entered and leave from its head once settled. The user
holds Run and the tasks hold RunState, so a Run that is dropped is noticed and cleaned up.

Longer than most modules: feeding, window, failures and the end of one run are one state machine, read as one.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from aiotime.channel import Channel, Overflow, check_overflow
from aiotime.errors import (
    AiotimeError,
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
)
from aiotime.frame import Frame, Prediction, Sample
from aiotime.ingest.entrance import Entrance
from aiotime.ingest.inspection import payload_bytes
from aiotime.ingest.pull import pull
from aiotime.observe.log import get_logger
from aiotime.observe.meter import LOOP_LANE, Ring, quantile
from aiotime.observe.stats import RunStats
from aiotime.stage import OnError, check_on_error

log = get_logger()


class Host(Protocol):
    """The pipeline, as a run sees it."""

    on_error: Mapping[str, OnError]  # by stage
    keeps_input: bool  # some stage's on_error will want to see the frame's input

    def lease(self) -> Entrance:
        """What is open, opened if need be; to be given back."""

    async def give_back(self) -> None:
        """A lease ends; the last one closes a pipeline that nobody opened by hand."""

    def inspect(self, payload: Any, index: int | None, key: Any) -> Any:
        """The payload if the model takes it, else `InputError`."""


class RunOptions:
    """What `run` was asked for; checked when it is made."""

    __slots__ = ("deadline", "failure_budget", "on_error", "ordered", "overflow", "window")

    def __init__(
        self,
        *,
        overflow: Overflow,
        on_error: OnError,
        deadline: float | None,
        failure_budget: int | float | None,
        window: int | None,
        ordered: bool = True,
    ) -> None:
        check_overflow(overflow)
        if on_error is None:
            raise ConfigurationError('on_error must be "raise", "skip" or a callable (frame, error), not None')
        check_on_error(on_error)
        check_deadline(deadline)
        if window is not None and window < 1:
            raise ConfigurationError(f"window must be at least 1 frame, not {window}")
        if failure_budget is not None and failure_budget < 0:
            raise ConfigurationError("failure_budget is a count (int) or a share (float below 1), not negative")
        if isinstance(failure_budget, float) and failure_budget >= 1:
            raise ConfigurationError(f"failure_budget={failure_budget} is no share below 1; for a count use an int")
        self.overflow: Overflow = overflow
        self.on_error = on_error
        self.deadline = deadline
        self.failure_budget = failure_budget
        self.window = window
        self.ordered = ordered  # False: predictions leave as they are ready


def check_deadline(deadline: float | None) -> None:
    """Raise `ConfigurationError` unless ``deadline`` is None or positive seconds."""
    if deadline is not None and not (deadline > 0 and math.isfinite(deadline)):
        raise ConfigurationError(f"a deadline is a positive number of seconds after arrival, not {deadline}")


class RunState:
    """The working half of a run; owner of its frames and their entrant at the door."""

    def __init__(self, host: Host, source: Any, options: RunOptions, number: int) -> None:
        self.host = host
        self.source = source
        self.options = options
        self.name = f"run {number}"
        self.engine: Entrance | None = None
        self.window: deque[Frame] = deque()  # in order; what the consumer has not taken
        self.limit = 1
        self.hold: Channel[Frame] = Channel(1)
        self.counts = {"in": 0, "out": 0, "shed": 0, "failed": 0}
        self.latencies = Ring()
        self.started_at = 0.0
        self.keep_input = callable(options.on_error) or host.keeps_input
        self.busy = False
        self.ended = False  # the source has nothing more
        self.closing = False
        self.error: BaseException | None = None  # raised after the frames before it
        self._fed = False  # the feeding ends or was told to: a further cancel would hit the source's own cleaning up
        self._last_index = -1
        self._lost = 0  # frames shed or failed before the newest prediction, where they leave as they are ready
        self._live = 0
        self._requested = False
        self._requesting = False
        self._ready: asyncio.Future[None] | None = None
        self._admitted: asyncio.Future[None] | None = None
        self._settled: asyncio.Future[None] | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._cleanup: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ beginning

    def start(self) -> None:
        """Begin to pull; opens the pipeline if need be."""
        if self.engine is not None:
            return
        if self.closing:
            raise ClosedError(f"{self.name} was closed")
        self.engine = engine = self.host.lease()
        self.started_at = engine.now()
        self.limit = self.options.window or 0
        if self.options.overflow != "wait":
            self.hold = Channel(self.window_limit(), overflow=self.options.overflow)
        engine.runs.add(self)
        self._feeder = engine.loop.create_task(self._feed(), name=f"source:{engine.name}:{self.name}")

    def window_limit(self) -> int:
        """Frames in flight or waiting for the consumer, at most."""
        assert self.engine is not None
        return self.limit or self.engine.door.frames

    # ------------------------------------------------------------------ source → hold → window

    async def _feed(self) -> None:
        engine, hold, wait = self.engine, self.hold, self.options.overflow == "wait"
        assert engine is not None
        iterator: Any = None
        try:
            iterator = pull(self.source, room=self._room)
            async for item in iterator:
                if self._fed:
                    break  # told to end; this source swallowed the cancellation
                frame = self._make(item)
                del item
                if wait and self._enter_directly(frame):
                    continue
                shed = hold.put_nowait(frame)
                if shed is not None:
                    self._shed_overflow(shed)
                self.request()
                if not wait:
                    await asyncio.sleep(0)  # a source that never waits must not keep the loop from the others
                    continue
                while hold.items:  # nothing is pulled that the pipeline has not got room for
                    self._admitted = engine.loop.create_future()
                    await self._admitted
        except asyncio.CancelledError as cause:
            if not self._fed:  # something that the source awaits was cancelled: not the end of the stream
                self.error = SourceError(f"the source was cancelled after {self.counts['in']} frames")
                self.error.__cause__ = cause
            raise
        except (KeyboardInterrupt, SystemExit):
            raise  # they belong to the loop
        except BaseException as cause:  # noqa: BLE001 - raised to the consumer, after the frames before it
            if isinstance(cause, ConfigurationError) and iterator is None:
                self.error = cause
            else:
                self.error = SourceError(
                    f"the source failed after {self.counts['in']} frames: {type(cause).__name__}: {cause}"
                )
                self.error.__cause__ = cause
            log.warning("source.failed", run=self.name, error=repr(cause))
        finally:
            self._fed = self.ended = True
            self._wake_ready()
            close = getattr(iterator, "aclose", None)
            if close is not None:
                try:
                    await close()
                except Exception as cause:  # noqa: BLE001 - raised to the consumer
                    if self.error is None and not self.closing:
                        self.error = SourceError(f"the source failed while it was closed: {cause}")
                        self.error.__cause__ = cause
                        self._wake_ready()

    def _make(self, item: Any) -> Frame:
        engine, options = self.engine, self.options
        assert engine is not None
        index = self.counts["in"]
        self.counts["in"] = index + 1
        engine.counts["in"] += 1
        sample = item if type(item) is Sample else None
        payload = item if sample is None else sample.input
        frame = engine.new_frame(self, index, None)
        deadline = options.deadline
        if sample is not None:
            frame.key, frame.target, frame.ack = sample.key, sample.target, sample.ack
            deadline = sample.deadline if sample.deadline is not None else deadline
        refused: InputError | None = None
        if deadline is not None:
            frame.deadline = frame.arrived + deadline
            if not deadline > 0:
                refused = InputError(
                    f"frame {index} was refused: its deadline is a positive number of seconds after arrival, "
                    f"not {deadline}",
                    frame=index,
                    key=frame.key,
                )
        if self.keep_input:
            frame.input = payload
        tail = frame.tail
        assert tail is not None
        try:
            if refused is not None:
                raise refused
            tail.value = self.host.inspect(payload, index, frame.key)
            if engine.course is not None:
                engine.course.enrol(frame, cut=sample is not None and sample.cut)
        except InputError as error:
            frame.settled, frame.error, frame.tail = True, error, None
        return frame

    def _enter_directly(self, frame: Frame) -> bool:
        """The common case in short: nothing is held, window and door have room."""
        engine = self.engine
        assert engine is not None
        door = engine.door
        if (
            frame.settled
            or door.nbytes is not None
            or len(self.window) >= (self.limit or door.frames)
            or (len(engine.runs) > 1 and self._has_its_share())
            or not door.take()
        ):
            return False
        self.window.append(frame)
        self._live += 1
        engine.enter(frame)
        return True

    def _has_its_share(self) -> bool:
        """As much is in flight of this run as of each, were all of them as greedy."""
        engine = self.engine
        assert engine is not None
        return self._live * len(engine.runs) >= engine.door.frames

    def _room(self) -> int:
        engine = self.engine
        assert engine is not None
        return min(self.window_limit() - len(self.window), engine.door.frames - engine.door.used)

    def request(self) -> None:
        """Bring in what is held, as far as window and credits allow."""
        engine = self.engine
        if self._requesting or self._requested or engine is None:
            return
        self._requesting = True
        try:
            while self.hold.items and len(self.window) < self.window_limit() and not self.closing:
                if self.hold.items[0].settled:  # refused: it needs no credit, only its place in the order
                    self._move_to_window()
                    continue
                self._requested = True
                if len(engine.runs) > 1 and self._has_its_share():
                    # many credits may have come at once: the others' feeding tasks are about to ask, too
                    engine.door.line_up(self, self)
                    engine.loop.call_soon(engine.door.pump)
                    return
                if not engine.door.admit(self, self):
                    return
        finally:
            self._requesting = False

    def _move_to_window(self) -> Frame:
        frame = self.hold.get_nowait()
        self.window.append(frame)
        if frame.settled:
            self._wake_ready()
        admitted = self._admitted
        if admitted is not None and not admitted.done():
            admitted.set_result(None)
        return frame

    # Entrant, called by the door

    def size(self) -> int:
        """Bytes of the frame that would enter next."""
        return next((payload_bytes(f.tail.value) for f in self.hold.items if f.tail is not None), 0)

    def enter(self) -> int | None:
        """A credit is ours: the held frame that the policy chooses goes in."""
        self._requested = False
        engine = self.engine
        assert engine is not None
        while self.hold.items and not self.closing:
            frame = self._move_to_window()  # "latest" is decided here, with the credit in hand
            if frame.settled:
                continue
            if frame.deadline is not None and engine.now() > frame.deadline:
                self._expire(frame)
                self.request()  # the next one may be larger than the one whose bytes were asked for
                return None
            if engine.door.nbytes is not None and frame.tail is not None:
                frame.nbytes = payload_bytes(frame.tail.value)
            self._live += 1
            engine.enter(frame)
            nbytes = frame.nbytes
            self.request()
            return nbytes
        return None

    def refused(self, why: AiotimeError) -> None:
        """The pipeline ended; frames of ours that were in it know already."""
        self._requested = False
        if self.error is None and not self.closing and (self.hold.items or not self.ended):
            self.error = why
        self.stop()
        while self.hold.items:
            frame = self.hold.get_nowait()
            self._count("shed", frame)
            self._acknowledge(frame, why)

    def _expire(self, frame: Frame) -> None:
        frame.settled, frame.tail = True, None
        frame.error = DeadlineExceeded(
            f"frame {frame.index} was shed: its deadline passed at the door", frame=frame.index, key=frame.key
        )
        self._wake_ready()

    def _shed_overflow(self, frame: Frame) -> None:
        self._count("shed", frame)
        self._acknowledge(
            frame, FrameShed(f"frame {frame.index} was shed by overflow={self.options.overflow!r}", frame=frame.index)
        )

    # Owner, called by the engine

    def settled(self, frame: Frame) -> None:
        """A frame of ours has its outcome."""
        self._live -= 1
        if self.closing:
            if self._settled is not None and not self._settled.done():
                self._settled.set_result(None)
            return
        if not self.options.ordered and frame in self.window:
            self.window.remove(frame)
            self.window.insert(self._ready_ahead(), frame)
        if self.window and self.window[0] is frame:
            self._wake_ready()

    def _ready_ahead(self) -> int:
        """Settled frames at the head of the window."""
        return next((place for place, frame in enumerate(self.window) if not frame.settled), len(self.window))

    def learning_failed(self, error: AiotimeError) -> None:
        """A backward of one of our frames raised: its prediction was handed out, learning from it was not possible."""
        stage = error.stage if isinstance(error, FrameError) else None
        policy = self.host.on_error.get(stage, self.options.on_error) if stage else self.options.on_error
        if policy == "raise" and self.error is None and not self.closing:
            self.error = error
            self.stop()

    # ------------------------------------------------------------------ window → consumer

    def _wake_ready(self) -> None:
        ready = self._ready
        if ready is not None and not ready.done():
            ready.set_result(None)

    async def next(self) -> Prediction:
        """The next prediction; cancelled: nothing is taken."""
        window = self.window
        while not self.closing:
            if window and window[0].settled:
                frame = window.popleft()
                if self.hold.items:
                    self.request()
                if frame.error is None:
                    return self.emit(frame)
                await self._failed(frame)
                continue
            if self.ended and not window and not self.hold.items:
                if self.engine is not None and self.error is None:
                    await self.engine.flush()
                    if window or self.error is not None:
                        continue
                await self.close()
                break
            assert self.engine is not None
            self._ready = self.engine.loop.create_future()
            try:
                await self._ready
            finally:
                self._ready = None
        error, self.error = self.error, None
        if error is not None:
            raise error
        raise StopAsyncIteration

    def emit(self, frame: Frame) -> Prediction:
        """Hand out the head of the window."""
        engine = self.engine
        assert engine is not None
        engine.counts["out"] += 1
        engine.undelivered += engine.now() - frame.arrived - frame.latency
        self.counts["out"] += 1
        self.latencies.add(frame.latency)
        if self.options.ordered:
            gap = frame.index - self._last_index - 1
            self._last_index = frame.index
        else:
            lost = self.counts["shed"] + self.counts["failed"]
            gap, self._lost = lost - self._lost, lost
        prediction = engine.prediction(frame, frame.index, gap)
        frame.value = frame.input = None  # an idle stage task still knows its last frame
        if frame.ack is not None:
            self._acknowledge(frame, None)
        return prediction

    async def _failed(self, frame: Frame) -> None:
        error = frame.error
        assert error is not None
        self._acknowledge(frame, error)
        if isinstance(error, FrameShed):
            self._count("shed", frame)
            return
        self._count("failed", frame)
        try:
            if not isinstance(error, FrameError):
                raise error
            policy = (
                self.host.on_error.get(error.stage, self.options.on_error) if error.stage else self.options.on_error
            )
            if policy == "raise":
                raise error
            self._check_budget(error)
            if callable(policy):
                await call_dead_letter(policy, frame, error)
        except asyncio.CancelledError:
            raise  # the consumer was cancelled while its callable ran; it may go on iterating
        except BaseException as fatal:
            self.error = fatal  # raised by the next call should this one be cancelled now
            await self.close()
            self.error = None
            raise

    def _check_budget(self, error: FrameError) -> None:
        budget, failed = self.options.failure_budget, self.counts["failed"]
        if budget is None:
            return
        if isinstance(budget, float):
            seen = failed + self.counts["out"]
            exceeded = failed > budget * seen and (seen * budget >= 1 or budget == 0)  # not at the first of many
            allowed = f"a share of {budget:g} ({failed} of {seen} failed)"
        else:
            exceeded, allowed = failed > budget, f"{budget} ({failed} failed)"
        if exceeded:
            raise FailureBudgetExceeded(
                f"more frames failed than the budget of {allowed}; the last: {error}"
            ) from error

    def _count(self, what: str, frame: Frame) -> None:
        engine = self.engine
        assert engine is not None
        self.counts[what] += 1
        engine.counts[what] += 1
        if engine.tracer is not None:
            engine.tracer.instant(LOOP_LANE, what, engine.now(), frame.index)

    def _acknowledge(self, frame: Frame, error: BaseException | None) -> None:
        ack, frame.ack = frame.ack, None
        if ack is not None:
            try:
                ack(error)
            except Exception as cause:  # noqa: BLE001 - told to the loop's exception handler
                assert self.engine is not None
                self.engine.loop.call_exception_handler(
                    {"message": f"aiotime: the ack of frame {frame.index} raised", "exception": cause}
                )

    # ------------------------------------------------------------------ end

    def stop(self) -> None:
        """Pull nothing more; what is in flight is still delivered, then the run ends."""
        self._stop_feeding()
        self.ended = True
        self._wake_ready()

    def _stop_feeding(self) -> None:
        if self._feeder is not None and not self._fed:
            self._fed = True
            self._feeder.cancel()

    async def close(self) -> None:
        """End at once: cancel the feeding, pass over queued work, wait for jobs that already run."""
        task = self.begin_close()
        if task is not None:
            await asyncio.shield(task)

    def begin_close(self) -> asyncio.Task[None] | None:
        """The task that ends this run, started once; None if the run never began."""
        if self._cleanup is None:
            self.closing = True
            if self.engine is None:
                return None  # it never began
            self._cleanup = self.engine.loop.create_task(self._clean_up(), name=f"close:{self.name}")
        return self._cleanup

    async def _clean_up(self) -> None:
        engine, feeder = self.engine, self._feeder
        assert engine is not None and feeder is not None
        self._wake_ready()
        self._stop_feeding()
        engine.door.withdraw(self, self)
        for frame in self.window:
            frame.cancelled = True
        await asyncio.wait([feeder])
        while self._live:
            self._settled = engine.loop.create_future()
            await self._settled
        gone = FrameCancelled(f"{self.name} ended before this frame was delivered")
        for frame in (*self.window, *self.hold.abort()):
            self._count("shed", frame)
            self._acknowledge(frame, gone)
        self.window.clear()
        engine.runs.discard(self)
        await self.host.give_back()

    def stats(self) -> RunStats:
        """A snapshot of the counters."""
        engine = self.engine
        latencies = self.latencies.values()
        return RunStats(
            name=self.name,
            elapsed=engine.now() - self.started_at if engine is not None else 0.0,
            frames_in=self.counts["in"],
            frames_out=self.counts["out"],
            frames_shed=self.counts["shed"],
            frames_failed=self.counts["failed"],
            window=len(self.window),
            latency_p50=quantile(latencies, 0.5),
            latency_p99=quantile(latencies, 0.99),
        )


async def call_dead_letter(policy: Callable[[Frame, FrameError], Any], frame: Frame, error: FrameError) -> None:
    """Hand a failed frame to the user's callable, plain or async."""
    result = policy(frame, error)
    if inspect.isawaitable(result):
        await result


class Run:
    """An async iterator of `Prediction`, in the order of the source; also an async context manager.

    It starts with the first ``await``. An error of the source, a stage or the door is raised from
    ``async for`` in its turn. Cancelling the consumer while it waits takes no prediction away: it may
    go on iterating. Leave it early with ``async with pipeline.run(source) as run`` or `aclose`; a run
    that is merely dropped is cleaned up too, with a ResourceWarning.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Prediction:
        state = self._state
        if state.busy:
            raise BusyError("this run is being iterated by another task; give each consumer a run of its own")
        state.busy = True
        try:
            window = state.window
            if window and window[0].settled and window[0].error is None and not state.closing and not state.hold.items:
                return state.emit(window.popleft())
            if state.engine is None:
                if state.closing:
                    raise StopAsyncIteration
                state.start()
            return await state.next()
        finally:
            state.busy = False

    async def __aenter__(self) -> Self:
        self._state.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def stop(self) -> None:
        """Stop pulling from the source; what is in flight is delivered, then the iteration ends normally."""
        self._state.stop()

    async def aclose(self) -> None:
        """End the run at once: its queued work is passed over. Waits until nothing of it is left. Idempotent."""
        await self._state.close()

    def stats(self) -> RunStats:
        """A snapshot of this run's counters."""
        return self._state.stats()

    def __del__(self) -> None:
        state = self._state
        if state.engine is not None and not state.closing and not state.engine.loop.is_closed():
            warnings.warn(
                "a run was dropped before it ended; leave it with 'async with pipeline.run(...) as run:' or "
                "'await run.aclose()'",
                ResourceWarning,
                stacklevel=2,
            )
            try:
                state.engine.loop.call_soon_threadsafe(state.begin_close)
            except RuntimeError:
                pass  # the loop has just been closed
