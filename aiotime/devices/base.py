"""The contract between the pipeline and whatever computes: pending values, work, device streams, devices.

    stage task ── launch(work, frame) ──▶ DeviceStream ── settles ──▶ Pending ── post ──▶ Completions ──▶ loop
                  (never blocks)           in order                   done | error            one wake-up for many

A device is one file behind this contract; adding one touches no other room. Nothing here knows of runs,
doors or plans. Times are seconds on the pipeline's clock.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aiotime.errors import DeadlineExceeded, FrameCancelled, FrameError, InputError, StageError
from aiotime.frame import NOBODY, Frame
from aiotime.observe.meter import LOOP_LANE, Recorder, Tally, Tracer


class Bell(Protocol):
    """Somebody who sleeps until a pending value is done. Ringing twice, or for nothing, does no harm."""

    def ring(self) -> None:
        """Wake the sleeper; any thread."""


class Sleeper(Bell, Protocol):
    """A bell with an alarm clock: whoever asks an agenda for a job."""

    def ring_at(self, when: float) -> None:
        """Wake by itself at ``when`` seconds on the stream's clock, if nobody rings before; on the stream's thread."""


class Event(Protocol):
    """A mark in a device's own queue of work (a CUDA event): passed when the device got there."""

    def query(self) -> bool:
        """True once the device has passed the mark; never blocks."""

    def synchronize(self) -> None:
        """Block the calling thread (never the loop) until the device has passed the mark."""


class Events:
    """Several marks as one: passed when all of them are."""

    __slots__ = ("events",)

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events

    def query(self) -> bool:
        """True once the devices have passed all of them."""
        return all(event.query() for event in self.events)

    def synchronize(self) -> None:
        """Block the calling thread until they have."""
        for event in self.events:
            event.synchronize()


class Pending:
    """The result of work that was launched and may not have finished; settled once, by the stream that owns the job.

    ``done`` turns True after ``value`` or ``error`` was written. ``event`` is None where the value may
    be read by the host at once; otherwise another stream of the device may use ``value`` after waiting
    for ``event`` on the device, and the host only after the event has passed.
    """

    __slots__ = ("bell", "done", "error", "event", "frame", "value", "waiter")

    def __init__(self, value: Any = None, *, done: bool = False, frame: Frame | None = None) -> None:
        self.value = value
        self.error: BaseException | None = None
        self.event: Event | None = None
        self.done = done
        self.frame = frame  # set on a frame's last launch: its completion settles the frame
        self.bell: Bell | None = None  # a downstream device stream
        self.waiter: asyncio.Future[None] | None = None  # tasks on the loop, see `finished`

    async def finished(self) -> None:
        """Wait until it is done: for the stage tasks of one pipeline, which share the future and end together."""
        while not self.done:
            if self.waiter is None or self.waiter.done():
                self.waiter = asyncio.get_running_loop().create_future()
            if not self.done:  # it may have finished before it could see the waiter
                await self.waiter


def always() -> bool:
    """For `Work.starved` where nobody knows better."""
    return True


class Work:
    """What one stage does to one value, and the recorders of the workers that do it.

    Args:
        fn: value -> value; raises to fail the frame.
        stage: the stage's name, for errors and traces.
        index: the stage's position in the pipeline.
        workers: how many jobs of this stage may run at once.
        timeout: seconds one job may take before its frame fails with `StageTimeout`.
        host_output: the next reader (stage or sink) reads the value on the host.
        grad: run with autograd recording; otherwise in ``torch.inference_mode``.
        phase: "forward", "backward" or "weights" (the gradient of the weights alone).
    """

    __slots__ = (
        "fn",
        "grad",
        "host_output",
        "index",
        "phase",
        "recorders",
        "stage",
        "starved",
        "tally",
        "timeout",
        "workers",
    )

    def __init__(
        self,
        fn: Callable[[Any], Any],
        *,
        stage: str,
        index: int,
        workers: int = 1,
        timeout: float | None = None,
        host_output: bool = True,
        grad: bool = False,
        phase: str = "forward",
    ) -> None:
        self.fn = fn
        self.stage = stage
        self.index = index
        self.workers = workers
        self.timeout = timeout
        self.host_output = host_output
        self.grad = grad
        self.phase = phase
        self.recorders: list[Recorder] = []  # one per worker, made by the stream the work is bound to
        self.tally: Tally | None = None  # where frames wait for company
        self.starved: Callable[[], bool] = always  # idle now because nothing came (else: credits held downstream)


# work, what it starts from, the frame it belongs to, its own result, and an action in place of the work
Job = tuple[Work, Pending, Frame, Pending, Callable[[], None] | None]

# from an agenda: what this token stood for has been done already, with an earlier one
SERVED: Job = (Work(id, stage="", index=-1), Pending(done=True), Frame(NOBODY, -1, Pending(), 0.0), Pending(), None)


class Agenda(Protocol):
    """Jobs that are decided on when they can run (learning: forwards against backwards; which frames share one)."""

    def take(self, bell: Sleeper) -> Job | None:
        """The job to run now, on the stream's thread; None: ``bell`` rings when one may have become ready.

        `SERVED`: there is nothing to do for this one of ``jobs``.
        """

    def poke(self) -> None:
        """Something was added to it; any thread."""


def passed_over(frame: Frame, now: Callable[[], float]) -> FrameCancelled | DeadlineExceeded | None:
    """Why ``frame`` must not be computed any more, or None; asked by a device stream just before a job runs."""
    if frame.cancelled:
        return FrameCancelled(f"frame {frame.index} was cancelled", frame=frame.index, key=frame.key)
    if frame.deadline is not None and now() > frame.deadline:
        return DeadlineExceeded(
            f"frame {frame.index} was shed: its deadline had passed before it was computed",
            frame=frame.index,
            key=frame.key,
        )
    return None


def stage_failed(work: Work, frame: Frame, cause: BaseException) -> FrameError:
    """``cause``, raised by user code, as this frame's error; without its traceback, which would pin the payload."""
    if isinstance(cause, InputError):  # a check of the input that ran on the device: still a refusal at the door
        cause.frame, cause.key = frame.index, frame.key
        return cause.with_traceback(None)
    try:
        said = str(cause)
    except Exception:  # one that cannot say what it is must not end the worker
        said = "(its message cannot be shown)"
    error = StageError(
        f"stage {work.stage!r} failed at frame {frame.index}: {type(cause).__name__}: {said}",
        stage=work.stage,
        frame=frame.index,
        key=frame.key,
    )
    error.__cause__ = cause.with_traceback(None)
    return error


class Completions:
    """Pending values on their way to the loop: posted by any thread, one wake-up of the loop for a burst."""

    __slots__ = ("_armed", "_handle", "_posted", "loop", "tracer")

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[Pending], None]) -> None:
        self.loop = loop
        self._handle = handle
        self._posted: deque[Pending] = deque()
        self._armed = False
        self.tracer: Tracer | None = None

    def put(self, pending: Pending) -> None:
        """Queue without waking the loop; the caller must `ring` soon."""
        self._posted.append(pending)

    def ring(self) -> None:
        """Wake the loop if something is queued and nobody has done so yet; any thread."""
        if self._posted and not self._armed:
            self._armed = True
            try:
                self.loop.call_soon_threadsafe(self.drain)
            except RuntimeError:
                pass  # the loop is closed: nobody is left to tell

    def deliver(self, pending: Pending) -> None:
        """Hand over one pending at once; on the loop."""
        self._handle(pending)

    def drain(self) -> None:
        """Hand over everything queued; on the loop."""
        self._armed = False  # before the queue is emptied, or a put in between is never announced
        posted, handle, tracer = self._posted, self._handle, self.tracer
        start = time.perf_counter() if tracer is not None else 0.0
        while posted:
            handle(posted.popleft())
        if tracer is not None:
            tracer.slice(LOOP_LANE, "settle", start, time.perf_counter())


class DeviceStream(ABC):
    """An in-order queue of work on a device. Jobs start in launch order; workers > 1 may finish out of order.

    Every method is called on the loop, `ring` from any thread. An upstream's error passes through without the job
    being run; a cancelled or expired frame is passed over just before its job would run.
    """

    name: str
    wants_host_ready: bool = False  # True: a stage task must await the upstream value before it launches

    @abstractmethod
    def bind(self, work: Work) -> None:
        """Prepare for jobs of ``work`` (its recorders, buffers); before the first launch."""

    @abstractmethod
    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        """Queue ``work`` on ``frame.tail``; never blocks, may not start before `ring`.

        ``last``: this is the frame's final launch; its pending carries the frame, so that its
        completion settles it.
        """

    @abstractmethod
    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        """Queue ``action`` (a control frame) so that nothing else of ``work`` runs while it does."""

    @abstractmethod
    def post(self, agenda: Agenda, jobs: int) -> bool:
        """``agenda`` will have ``jobs`` more jobs for this stream. False once closed."""

    @abstractmethod
    def ring(self) -> None:
        """Let what was launched start; called once after a burst of launches."""

    def pulse(self, now: float) -> None:  # noqa: B027 - most devices delay nothing
        """Keep delays bounded: called on the loop every few milliseconds while frames are in flight.

        Announce what was finished but not yet announced; end jobs whose ``work.timeout`` has passed.
        """

    @abstractmethod
    def close(self) -> None:
        """Accept nothing more; what is queued settles with its turn, then the workers end. Idempotent."""

    @abstractmethod
    async def join(self) -> None:
        """Wait until every worker has ended and buffers are free."""


class Clock(Protocol):
    """Seconds. Real time, or the virtual time of simulated devices."""

    def now(self) -> float:
        """Monotonic seconds."""


class RealClock:
    """``time.perf_counter``: what every device but the simulated one lives on."""

    now = staticmethod(time.perf_counter)


class Device(ABC):
    """Where stages run: opens device streams and can time work for the planner."""

    name: str  # as written by the user: "cpu:0", "cuda:1", "inline"
    clock: Clock = RealClock()
    speed_class: str  # devices of one class need to be measured once: "cpu×1", "inline", "cuda:0"
    on_host: bool = True  # values live in the host's memory
    shares_stream: bool = True  # stages on the same device, one worker each, share one stream
    may_sleep: bool = True  # its workers may block (retry with backoff) without holding up the loop

    @abstractmethod
    def open(self, completions: Completions, *, workers: int = 1, label: str | None = None) -> DeviceStream:
        """A new device stream with ``workers`` workers; ``label`` names its threads and its lane in a trace."""

    @abstractmethod
    def place(self, module: Any) -> Any:
        """Put an ``nn.Module`` where this device computes (parameters and buffers), returning it."""

    @abstractmethod
    def measure(self, fn: Callable[[Any], Any], value: Any, *, seconds: float = 0.05) -> tuple[float, Any]:
        """Time ``fn(value)`` on this device, warm: (median seconds per call, the result, left on the device).

        Spends about ``seconds`` (and at least three calls). Blocks: not for use on a running loop.
        """

    @abstractmethod
    def transfer_seconds(self, nbytes: int, to: Device) -> float:
        """Measured or estimated seconds to move ``nbytes`` from this device to ``to``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
