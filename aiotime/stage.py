"""A stage: what the user says of it, and the task that receives, launches and hands on.

    inbox ──▶ [ wait for room ▸ take a frame ▸ launch it ▸ hand it on with its pending value ] ──▶ next inbox

Launch ahead, wait late: the task never waits for a result of its own, only for room among its launches.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from aiotime.batching.joining import Group, check_batching
from aiotime.channel import Channel
from aiotime.compiling import check_way
from aiotime.devices.base import Device, DeviceStream, Pending, Work
from aiotime.errors import ConfigurationError, FrameError
from aiotime.frame import Frame

if TYPE_CHECKING:
    from aiotime.batching.desk import Batching
    from aiotime.compiling import Program
    from aiotime.learning.chimera import Fork, Replica
    from aiotime.learning.desk import Desk, Hands
    from aiotime.learning.order import Order

DeadLetter = Callable[[Frame, FrameError], Any]
OnError = Literal["raise", "skip"] | DeadLetter

INLINE_SLICE = 1e-3  # seconds of inline work in a row before the loop gets a turn


@dataclass(frozen=True, slots=True)
class Retry:
    """Run a failed job again before its error counts; made by `retry`."""

    attempts: int
    backoff: float
    then: OnError | None


def retry(n: int, backoff: float = 0.1, *, then: OnError | None = None) -> Retry:
    """A stage's ``on_error``: try a failed frame ``n`` more times.

    The worker waits ``backoff`` seconds before the first new attempt and twice as long before each
    further one; later frames of that worker wait with it, so that order is kept.

    Args:
        n: further attempts, at least 1.
        backoff: seconds, 0 for none. A stage on ``inline`` cannot wait and takes only 0.
        then: what happens to a frame that failed every time; None: what the run says.
    """
    if n < 1 or backoff < 0:
        raise ConfigurationError(
            f"retry(n, backoff) needs n >= 1 and backoff >= 0 seconds, not n={n}, backoff={backoff}"
        )
    check_on_error(then)
    return Retry(n, backoff, then)


def check_on_error(policy: Any) -> None:
    """Raise `ConfigurationError` unless ``policy`` is None, "raise", "skip" or a callable."""
    if policy is not None and policy not in ("raise", "skip") and not callable(policy):
        raise ConfigurationError(f'on_error must be "raise", "skip" or a callable (frame, error), not {policy!r}')


class Stage:
    """One stage of `Pipeline.from_stages`: a function or module, and where it runs.

    Args:
        fn: ``value -> value``. A module gets a tensor as its argument, a tuple as positional and a dict
            as keyword arguments; a function gets the value as it is.
        device: ``"cpu:0"``, ``"cuda:0"``, ``"inline"`` or a Device. None: a CPU worker of its own. Stages
            that name the same ``cpu:N`` share its thread.
        name: for errors, statistics and traces; by default that of the function or module.
        workers: how many frames this stage may work on at once; the order of frames is kept. For
            functions and modules without state.
        on_error: ``"raise"``, ``"skip"``, a callable ``(frame, error)``, or `retry`; None: what the run says.
        timeout: seconds after which a frame fails with `StageTimeout`. Python cannot end a running
            function: its thread is left to itself and replaced. With ``max_batch`` a batch has that long, and all of
            its frames fail: nobody can tell which of them it was.
        max_batch: frames of equal structure, dtype and shape that run as one call where they wait when the stage can
            start. Each gets its own result, a view of the batch's. Row i of what ``fn`` returns must belong to row i of
            what it was given. Where a batch fails its frames are run again one by one: only the guilty one fails.
        max_wait: seconds that a stage which could start waits for the batch to become full.
        group: ``"cat"`` joins along the first dimension there is (``fn`` gets what it would get without batches, only
            larger; sizes of that dimension may differ); ``"stack"`` makes one, also for a batch of one frame.
        compile: how to compile a module, see `aiotime.Pipeline`; values that are not like ``example`` run eagerly.
        example: what ``compile`` compiles for: a value as this stage gets it (with ``max_batch``, one frame's).

    Example:
        >>> aiotime.Stage(str.upper, device="cpu:0", workers=2, on_error=aiotime.retry(3, backoff=0.01))
        Stage('upper', device='cpu:0', workers=2)
    """

    _joins = "frames"  # what max_batch counts

    def __init__(
        self,
        fn: Callable[[Any], Any],
        *,
        device: str | Device | None = None,
        name: str | None = None,
        workers: int = 1,
        on_error: OnError | Retry | None = None,
        timeout: float | None = None,
        compile: str | None = None,
        example: Any = None,
        max_batch: int = 1,
        max_wait: float = 0.0,
        group: Group = "cat",
    ) -> None:
        if not callable(fn):
            raise ConfigurationError(f"a stage is made of a function or module, not of a {type(fn).__name__}")
        call = fn.forward if isinstance(fn, torch.nn.Module) else fn
        if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__):
            raise ConfigurationError(
                f"stage {_name_of(fn)!r} is an async function; a stage computes. Await in the source, or in the "
                "body of 'async for' behind the pipeline"
            )
        if workers < 1:
            raise ConfigurationError(f"stage {_name_of(fn)!r} needs at least one worker, not {workers}")
        if timeout is not None and timeout <= 0:
            raise ConfigurationError(f"stage {_name_of(fn)!r}: timeout must be positive seconds, not {timeout}")
        if not isinstance(on_error, Retry):
            check_on_error(on_error)
        check_way(compile)
        if compile is not None and (example is None or not isinstance(fn, torch.nn.Module)):
            raise ConfigurationError(
                f"stage {_name_of(fn)!r}: compile={compile!r} needs a torch.nn.Module and example=..., a value as this "
                "stage gets it"
            )
        check_batching(name or _name_of(fn), max_batch, max_wait, group, of=self._joins)
        self.fn = fn
        self.compile = compile
        self.example = example
        self.device = device
        self.name = name or _name_of(fn)
        self.workers = workers
        self.on_error = on_error
        self.timeout = timeout
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.group: Group = group

    def __repr__(self) -> str:
        more = f", max_batch={self.max_batch}" if self.max_batch > 1 else ""
        return f"Stage({self.name!r}, device={self.device!r}, workers={self.workers}{more})"


@dataclass(slots=True)
class StageSpec:
    """A stage with everything resolved, as the engine takes it."""

    name: str
    fn: Callable[[Any], Any]
    device: Device
    workers: int = 1
    on_error: OnError | None = None
    timeout: float | None = None
    batching: Batching | None = None  # what it does with frames that wait
    hands: Hands | None = None  # what learns here
    order: Order | None = None  # and in which order
    replica: Replica | None = None  # of the same stage, for the pipeline in the other direction
    remake: Callable[[Any], Callable[[Any], Any]] | None = None  # ``fn`` of a copy of its module
    program: Program | None = None  # what its module was compiled to

    def launches(self, depth: int, *, adaptive: bool) -> int:
        """How many may be in flight. An adaptive ``depth`` leaves room for a batch that runs and one that gathers."""
        if self.batching is not None and adaptive:
            depth = max(depth, 2 * self.batching.most)
        return depth * self.workers


def unique_names(names: Sequence[str]) -> list[str]:
    """The same names, later ones numbered where they repeat: relu, relu.2, relu.3."""
    taken, result = set(names), []
    numbers: dict[str, int] = {}
    for name in names:
        number = numbers[name] = numbers.get(name, 0) + 1
        unique = name
        while number > 1 and unique in taken:
            unique = f"{name}.{number}"
            number += 1
        taken.add(unique)
        result.append(unique)
    return result


def spread(module: torch.nn.Module) -> Callable[[Any], Any]:
    """``module`` as a function of one value: a tuple becomes positional, a dict keyword arguments."""

    def call(value: Any) -> Any:
        if type(value) is tuple:
            return module(*value)
        if type(value) is dict:
            return module(**value)
        return module(value)

    return call


class Spread(torch.nn.Module):
    """The same as a module: called with one value."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)
        self._call = spread(module)

    def forward(self, value: Any) -> Any:
        """What ``module`` returns for ``value``."""
        return self._call(value)


def with_retries(fn: Callable[[Any], Any], policy: Retry, stage: str, device: Device) -> Callable[[Any], Any]:
    """``fn``, tried again as ``policy`` says."""
    if policy.backoff and not device.may_sleep:
        raise ConfigurationError(
            f"stage {stage!r} runs on {device.name} and must not wait between attempts: "
            f"use retry({policy.attempts}, backoff=0) or a device with a thread of its own"
        )

    def attempt(value: Any) -> Any:
        pause = policy.backoff
        for _ in range(policy.attempts):
            try:
                return fn(value)
            except Exception:  # noqa: BLE001 - the last attempt, below, is the one whose error counts
                if pause:
                    time.sleep(pause)
                pause *= 2
        return fn(value)

    return attempt


class StageRunner:
    """The working half of a stage in an open pipeline: its inbox, its device stream, its launches."""

    __slots__ = ("_room", "desk", "inbox", "launched", "limit", "ready", "spec", "stream", "work")

    def __init__(
        self,
        spec: StageSpec,
        work: Work,
        stream: DeviceStream,
        limit: int,
        ready: Callable[[Pending], Awaitable[None]],
        desk: Desk | Fork | None = None,
    ) -> None:
        self.spec = spec
        self.desk = desk  # decides the order of jobs where this stage learns
        self.work = work
        self.stream = stream
        self.limit = limit  # launches in flight; changed while running when the depth adapts
        self.ready = ready  # await until the host may read a pending value
        self.inbox: Channel[Frame] = Channel()  # bounded by the credits at the door, so a put never waits
        self.launched: deque[Pending] = deque()
        self._room: asyncio.Future[None] | None = None  # set by whichever of several workers' launches ends first

    @property
    def works(self) -> tuple[Work, ...]:
        """All kinds of jobs it has: forward, and where it learns backward and weights."""
        return (self.work,) if self.desk is None else self.desk.works

    async def serve(self, following: Channel[Frame] | None) -> None:
        """Take, launch, hand on, until cancelled. Between taking and handing on nothing can be lost."""
        try:
            await self._serve(following)
        finally:
            self.stream.ring()  # ends a burst that a crash cut short

    async def _serve(self, following: Channel[Frame] | None) -> None:
        inbox, stream, launched, work = self.inbox, self.stream, self.launched, self.work
        desk = self.desk
        items, last, on_loop = inbox.items, following is None, stream.wants_host_ready
        slice_start = time.perf_counter()
        while True:
            while launched and launched[0].done:
                launched.popleft()
            if len(launched) >= self.limit:
                stream.ring()
                await self._until_room()
                continue
            if not items:
                stream.ring()
                frame = await inbox.get()
                slice_start = time.perf_counter()
            else:
                frame = inbox.get_nowait()
            if on_loop and desk is None:  # a desk waits by itself, also for what comes from above
                tail = frame.tail
                if tail is not None and (not tail.done or tail.event is not None):
                    stream.ring()
                    await self.ready(tail)
            if frame.settled:
                continue  # the pipeline ended it meanwhile
            if desk is not None:
                action = None if frame.control is None else _action(frame, work.index)
                pending = desk.launch(stream, frame, action, last=last)
            elif frame.control is None:
                pending = stream.launch(work, frame, last=last)
            else:
                pending = stream.exclusive(work, _action(frame, work.index), frame, last=last)
            if not frame.settled:
                frame.tail = pending
            if not last:
                assert following is not None
                following.put_nowait(frame)
            if on_loop:
                if time.perf_counter() - slice_start > INLINE_SLICE:
                    stream.ring()
                    await asyncio.sleep(0)
                    slice_start = time.perf_counter()
            else:
                launched.append(pending)

    async def _until_room(self) -> None:
        """Half of a long queue is refilled at once, a short one as soon as there is room."""
        launched, workers = self.launched, self.spec.workers
        if workers > 1:  # they finish out of order, and a slow one must not keep the others' places
            for _ in range(len(launched)):
                pending = launched.popleft()
                if not pending.done:
                    launched.append(pending)
            if len(launched) < self.limit:
                return
        if len(launched) >= 8 * workers and self.spec.batching is None:  # with a batch many come back at once
            await launched[len(launched) // 2].finished()
        elif workers == 1:
            await launched[0].finished()
        else:
            if self._room is None or self._room.done():
                self._room = asyncio.get_running_loop().create_future()
            for pending in launched:
                if pending.waiter is None or pending.waiter.done():
                    pending.waiter = self._room
            if not any(pending.done for pending in launched):
                await self._room


def _action(frame: Frame, stage: int) -> Callable[[], None]:
    control = frame.control
    assert control is not None
    return lambda: control.apply(stage)


def _name_of(fn: Any) -> str:
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return "stage" if name == "<lambda>" else str(name)
