"""Tests of aiotime.devices.base: why a frame is passed over, errors of stages, completions on their way to the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from aiotime.devices.base import Completions, Pending, RealClock, Work, passed_over, stage_failed
from aiotime.errors import DeadlineExceeded, FrameCancelled, InputError, StageError
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.conftest import Settle


class Nobody:
    def settled(self, frame: Frame) -> None: ...


def frame(index: int = 3) -> Frame:
    made = Frame(Nobody(), index, Pending(done=True), 0.0)
    made.key = "camera"
    return made


def at(seconds: float) -> Callable[[], float]:
    return lambda: seconds


# ------------------------------------------------------------------------------------------------- passed over


def test_a_wanted_frame_is_computed() -> None:
    """A frame that is neither cancelled nor late is not passed over, on the very tick of its deadline neither."""
    wanted = frame()
    assert passed_over(wanted, at(9.0)) is None
    wanted.deadline = 9.0
    assert passed_over(wanted, at(9.0)) is None


def test_a_late_frame_is_passed_over() -> None:
    """Past its deadline a frame gets an error that names it."""
    late = frame()
    late.deadline = 9.0
    error = passed_over(late, at(9.001))
    assert isinstance(error, DeadlineExceeded)
    assert isinstance(error, TimeoutError)
    assert (error.frame, error.key) == (3, "camera")


def test_a_cancelled_frame_is_passed_over() -> None:
    """Cancellation wins over lateness."""
    gone = frame()
    gone.cancelled, gone.deadline = True, 1.0
    error = passed_over(gone, at(9.0))
    assert isinstance(error, FrameCancelled)
    assert (error.frame, error.key) == (3, "camera")


# ------------------------------------------------------------------------------------------------------ errors


def test_stage_failed_names_stage_and_frame() -> None:
    """The user's exception becomes the cause of a StageError, without the traceback that would pin the payload."""
    try:
        raise ValueError("boom")
    except ValueError as caught:
        cause = caught
    error = stage_failed(Work(str, stage="encoder", index=0), frame(), cause)
    assert isinstance(error, StageError)
    assert str(error) == "stage 'encoder' failed at frame 3: ValueError: boom"
    assert (error.stage, error.frame, error.key) == ("encoder", 3, "camera")
    assert error.__cause__ is cause
    assert cause.__traceback__ is None


def test_a_refusal_on_the_device_stays_a_refusal() -> None:
    """An InputError from a check on the device is the frame's own error, not the stage's."""
    refusal = InputError("expected finite values")
    assert stage_failed(Work(str, stage="encoder", index=0), frame(), refusal) is refusal
    assert (refusal.stage, refusal.frame, refusal.key) == (None, 3, "camera")


# ------------------------------------------------------------------------------------------------- completions


@pytest.mark.asyncio
async def test_one_wake_up_for_many(settle: Settle) -> None:
    """Pending values put by a thread reach the loop in order, and many share a wake-up."""
    seen: list[object] = []
    completions = Completions(asyncio.get_running_loop(), lambda pending: seen.append(pending.value))

    def work() -> None:
        for i in range(1000):
            completions.put(Pending(i))
            if i % 10 == 0:
                completions.ring()
        completions.ring()

    thread = threading.Thread(target=work)
    thread.start()
    await settle(until=lambda: len(seen) == 1000)
    assert seen == list(range(1000))
    await asyncio.to_thread(thread.join)


@pytest.mark.asyncio
async def test_nothing_is_announced_without_a_ring(settle: Settle) -> None:
    """A put alone wakes nobody; a put while the queue is being emptied is handed over with it."""
    seen: list[object] = []

    def handle(pending: Pending) -> None:
        seen.append(pending.value)
        if pending.value == 0:
            completions.put(Pending(1))

    completions = Completions(asyncio.get_running_loop(), handle)
    completions.ring()
    completions.put(Pending(0))
    await settle()
    assert seen == []
    completions.ring()
    await settle()
    assert seen == [0, 1]


@pytest.mark.asyncio
async def test_every_burst_is_announced(settle: Settle) -> None:
    """After one burst was handed over the next one wakes the loop again."""
    seen: list[object] = []
    completions = Completions(asyncio.get_running_loop(), lambda pending: seen.append(pending.value))
    for i in range(5):
        completions.put(Pending(i))
        completions.ring()
        await settle()
        assert seen == list(range(i + 1))


def test_ringing_a_closed_loop_is_harmless() -> None:
    """A worker that outlives the loop tells nobody and goes on."""
    loop = asyncio.new_event_loop()
    completions = Completions(loop, lambda pending: None)
    loop.close()
    completions.put(Pending())
    completions.ring()


@pytest.mark.asyncio
async def test_several_tasks_wait_for_one_pending(settle: Settle) -> None:
    """The stage that launched it and the stage that reads it may wait for the same pending value."""
    pending = Pending()
    tasks = [asyncio.create_task(pending.finished()) for _ in range(3)]
    await settle()
    assert not any(task.done() for task in tasks)
    pending.done = True
    assert pending.waiter is not None
    pending.waiter.set_result(None)
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    await pending.finished()


def test_real_clock_moves_forward() -> None:
    """Real time is monotonic seconds."""
    assert RealClock.now() <= RealClock().now()
