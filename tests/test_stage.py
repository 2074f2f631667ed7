"""Tests of aiotime.stage: what a stage may be, retries, and the task that takes, launches and hands on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import aiotime
from aiotime import Stage
from aiotime.channel import Channel
from aiotime.devices import CpuDevice, InlineDevice
from aiotime.devices.base import Agenda, DeviceStream, Pending, Work
from aiotime.errors import ConfigurationError
from aiotime.frame import Frame
from aiotime.stage import Retry, StageRunner, StageSpec, check_on_error, retry, spread, unique_names, with_retries

if TYPE_CHECKING:
    from tests.conftest import Settle


def same(x: Any) -> Any:
    return x


# ------------------------------------------------------------------------------------------------ what a stage is


async def awaits(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fn": 3}, "a function or module, not of a int"),
        ({"fn": awaits}, "'awaits' is an async function"),
        ({"fn": same, "workers": 0}, "at least one worker, not 0"),
        ({"fn": same, "timeout": 0.0}, "timeout must be positive"),
        ({"fn": same, "on_error": "ignore"}, "on_error must be"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    """A stage that could never work is refused where it is written."""
    with pytest.raises(ConfigurationError, match=message):
        Stage(options.pop("fn"), **options)


def test_names() -> None:
    """A stage is called after its function or module, a lambda just stage; repeated names are numbered."""
    assert [Stage(fn).name for fn in (same, torch.nn.ReLU(), lambda x: x)] == ["same", "ReLU", "stage"]
    assert Stage(same, name="mine").name == "mine"
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a.2", "a.3"]
    assert repr(Stage(same, device="cpu:0", workers=2)) == "Stage('same', device='cpu:0', workers=2)"


def test_unique_names_do_not_meet_a_given_one() -> None:
    """A number that the user has given already is not given again."""
    names = unique_names(["a", "a", "a.2"])
    assert len(set(names)) == 3


def test_spread() -> None:
    """A module gets a tuple as positional and a dict as keyword arguments, anything else as its one argument."""

    class Subtract(torch.nn.Module):
        def forward(self, a: Any, b: Any = 0) -> Any:
            return a - b

    call = spread(Subtract())
    assert [call(5), call((5, 2)), call({"b": 5, "a": 2})] == [5, 3, -3]


@pytest.mark.parametrize("policy", [None, "raise", "skip", print])
def test_policies(policy: Any) -> None:
    """None, the two words and callables are policies."""
    check_on_error(policy)


# ------------------------------------------------------------------------------------------------------- retries


class Flaky:
    """Fails ``failures`` times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            raise ValueError(f"attempt {self.calls}")
        return x


def test_retry_waits_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits before further attempts double, and there is none after the last."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    flaky = Flaky(3)
    assert with_retries(flaky, Retry(3, 0.1, None), "s", CpuDevice())("x") == "x"
    assert flaky.calls == 4
    assert waits == pytest.approx([0.1, 0.2, 0.4])


def test_retry_gives_up_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After n further attempts the last error counts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("backoff=0 must not sleep"))
    flaky = Flaky(10)
    with pytest.raises(ValueError, match="attempt 3"):
        with_retries(flaky, Retry(2, 0.0, None), "s", InlineDevice())("x")


def test_retry_on_the_loop_must_not_wait() -> None:
    """A stage on the loop may try again at once, not after a pause."""
    with pytest.raises(ConfigurationError, match=r"use retry\(2, backoff=0\)"):
        with_retries(same, Retry(2, 0.1, None), "s", InlineDevice())


@pytest.mark.parametrize(("n", "backoff"), [(0, 0.1), (1, -1.0)])
def test_retry_refuses_nonsense(n: int, backoff: float) -> None:
    """Fewer than one further attempt and negative pauses are refused."""
    with pytest.raises(ConfigurationError, match="n >= 1 and backoff >= 0"):
        retry(n, backoff)
    with pytest.raises(ConfigurationError, match="on_error"):
        retry(1, 0.0, then="later")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- the stage task


class Nobody:
    def settled(self, frame: Frame) -> None: ...


class HandStream(DeviceStream):
    """A device stream whose jobs end when the test says so."""

    name = "hand"

    def __init__(self) -> None:
        self.launched: list[Pending] = []
        self.rings = 0

    def bind(self, work: Work) -> None: ...

    def post(self, agenda: Agenda, jobs: int) -> bool:
        raise AssertionError("no stage learns here")

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        self.launched.append(Pending(frame=frame if last else None))
        return self.launched[-1]

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        action()
        return self.launch(work, frame, last=last)

    def ring(self) -> None:
        self.rings += 1

    def close(self) -> None: ...

    async def join(self) -> None: ...

    def finish(self, number: int) -> None:
        pending = self.launched[number]
        pending.done = True
        if pending.waiter is not None and not pending.waiter.done():
            pending.waiter.set_result(None)


class Bench:
    """A stage task at work between an inbox and the next."""

    def __init__(self, *, limit: int, workers: int = 1) -> None:
        self.stream = HandStream()
        work = Work(same, stage="s", index=4)
        self.runner = StageRunner(StageSpec("s", same, CpuDevice(), workers), work, self.stream, limit, self.ready)
        self.following: Channel[Frame] = Channel()
        self.task = asyncio.create_task(self.runner.serve(self.following))

    async def ready(self, pending: Pending) -> None:
        raise AssertionError("a stream with threads waits for itself")

    def put(self, *indices: int) -> list[Frame]:
        frames = [Frame(Nobody(), i, Pending(i, done=True), 0.0) for i in indices]
        for frame in frames:
            self.runner.inbox.put_nowait(frame)
        return frames

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.mark.asyncio
async def test_launches_ahead_and_hands_on_at_once(settle: Settle) -> None:
    """A frame is handed on with its pending value before that is done; a burst of launches rings once."""
    bench = Bench(limit=8)
    frames = bench.put(0, 1, 2)
    await settle()
    assert [f.index for f in bench.following.items] == [0, 1, 2]
    assert [f.tail for f in frames] == bench.stream.launched
    assert bench.stream.rings == 1
    await bench.end()


@pytest.mark.asyncio
async def test_takes_no_frame_without_room_to_launch_it(settle: Settle) -> None:
    """At its limit of launches in flight a stage leaves frames in its inbox until the oldest has ended."""
    bench = Bench(limit=2)
    bench.put(*range(5))
    await settle()
    assert (len(bench.stream.launched), len(bench.runner.inbox)) == (2, 3)
    bench.stream.finish(1)
    await settle()
    assert len(bench.stream.launched) == 2  # the oldest of a short queue is what counts
    bench.stream.finish(0)
    await settle()
    assert len(bench.stream.launched) == 4
    await bench.end()
    assert len(bench.runner.inbox) == 1  # a cancelled stage has not lost what it did not take


@pytest.mark.asyncio
async def test_a_long_queue_is_refilled_by_the_half(settle: Settle) -> None:
    """With many launches in flight the task wakes once for many of them."""
    bench = Bench(limit=8)
    bench.put(*range(20))
    await settle()
    for i in range(4):
        bench.stream.finish(i)
        await settle()
        assert len(bench.stream.launched) == 8
    bench.stream.finish(4)
    await settle()
    assert len(bench.stream.launched) == 13
    await bench.end()


@pytest.mark.asyncio
@pytest.mark.parametrize(("limit", "workers"), [(4, 2), (16, 4), (16, 2)])
async def test_a_slow_worker_does_not_keep_the_places_of_the_others(settle: Settle, limit: int, workers: int) -> None:
    """Launches that end out of order make room at once, however long the oldest takes, and the loop stays free."""
    bench = Bench(limit=limit, workers=workers)
    bench.put(*range(200))
    await settle()
    assert len(bench.stream.launched) == limit
    for i in range(1, 100):  # never the first
        bench.stream.finish(i)
        await settle()
        assert limit // 2 < len(bench.stream.launched) - i <= limit
    assert len(bench.stream.launched) >= 99 + limit // 2
    await bench.end()


@pytest.mark.asyncio
async def test_settled_frames_are_left_alone(settle: Settle) -> None:
    """A frame that ended while it waited is neither launched nor handed on."""
    bench = Bench(limit=4)
    bench.put(0)[0].settled = True
    bench.put(1)
    await settle()
    assert [f.index for f in bench.following.items] == [1]
    await bench.end()


@pytest.mark.asyncio
async def test_control_frames_act_with_the_number_of_their_stage(settle: Settle) -> None:
    """A control frame's action is told where it is."""

    class Swap:
        stages: list[int] = []

        def apply(self, stage: int) -> None:
            self.stages.append(stage)

    bench = Bench(limit=4)
    frame = Frame(Nobody(), -1, Pending(done=True), 0.0)
    frame.control = Swap()
    bench.runner.inbox.put_nowait(frame)
    await settle()
    assert Swap.stages == [4]
    assert list(bench.following.items) == [frame]
    await bench.end()


def test_public_names() -> None:
    """Stage and retry are what aiotime offers."""
    assert aiotime.Stage is Stage
    assert aiotime.retry is retry
