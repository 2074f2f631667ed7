"""Tests of aiotime.devices.inline: jobs on the loop itself, in inference mode by the burst."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aiotime.devices import InlineDevice
from aiotime.devices.base import Completions, Pending, Work
from aiotime.devices.inline import InlineStream
from aiotime.errors import ClosedError, ConfigurationError, DeadlineExceeded, FrameCancelled, StageError
from aiotime.frame import Frame


class Nobody:
    def settled(self, frame: Frame) -> None: ...


def bench(fn: Callable[[Any], Any], *, grad: bool = False) -> tuple[InlineStream, Work, list[Pending]]:
    done: list[Pending] = []
    stream = InlineDevice().open(Completions(asyncio.get_running_loop(), done.append))
    work = Work(fn, stage="s", index=0, grad=grad)
    stream.bind(work)
    return stream, work, done


def frame(value: Any, index: int = 0) -> Frame:
    return Frame(Nobody(), index, Pending(value, done=True), 0.0)


@pytest.mark.asyncio
async def test_a_job_runs_at_its_launch_on_the_loop() -> None:
    """The launch returns with the result, computed on this very thread, its completion told."""
    stream, work, done = bench(lambda x: (x + 1, threading.current_thread()))
    pending = stream.launch(work, frame(1), last=True)
    assert pending.done
    assert pending.value == (2, threading.current_thread())
    assert done == [pending]
    assert work.recorders[0].jobs == 1


@pytest.mark.asyncio
async def test_inference_mode_lasts_for_a_burst() -> None:
    """Jobs run in inference mode; after `ring` the loop is out of it; autograd is off only inside."""
    stream, work, _ = bench(lambda x: torch.is_inference_mode_enabled())
    assert [stream.launch(work, frame(0), last=True).value for _ in range(3)] == [True, True, True]
    stream.ring()
    assert not torch.is_inference_mode_enabled()
    stream.ring()
    recording, grad_work, _ = bench(lambda x: torch.is_inference_mode_enabled(), grad=True)
    assert recording.launch(grad_work, frame(0), last=True).value is False


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [ValueError, asyncio.CancelledError, GeneratorExit])
async def test_an_error_is_a_value(bad: type[BaseException]) -> None:
    """What the code raises is the frame's error, a CancelledError included: it must not end the stage's task."""

    def fn(x: int) -> int:
        raise bad

    stream, work, done = bench(fn)
    stream.launch(work, frame(1), last=True)
    assert isinstance(done[0].error, StageError)
    assert isinstance(done[0].error.__cause__, bad)
    stream.ring()


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_belongs_to_the_loop(bad: type[BaseException]) -> None:
    """Ctrl-C inside an inline stage is the process's, not the frame's."""

    def fn(x: int) -> int:
        raise bad

    stream, work, _ = bench(fn)
    with pytest.raises(bad):
        stream.launch(work, frame(1), last=True)
    stream.ring()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.asyncio
async def test_unwanted_frames_are_passed_over() -> None:
    """Failed upstreams, cancelled and late frames, and a closed stream: nothing is computed."""
    ran: list[int] = []
    stream, work, done = bench(ran.append)
    failed, cancelled, late = frame(0), frame(1), frame(2)
    assert failed.tail is not None
    failed.tail.error = ValueError("earlier")
    cancelled.cancelled = True
    late.deadline = -1.0
    for each in (failed, cancelled, late):
        stream.launch(work, each, last=True)
    stream.close()
    stream.launch(work, frame(3), last=True)
    assert [type(p.error) for p in done] == [ValueError, FrameCancelled, DeadlineExceeded, ClosedError]
    assert ran == []
    assert work.recorders[0].passed == 4
    await stream.join()


@pytest.mark.asyncio
async def test_exclusive_actions() -> None:
    """A control frame's action runs at once, fails its own frame, and is passed over behind a failure."""
    log: list[str] = []
    stream, work, done = bench(str)
    stream.exclusive(work, lambda: log.append("ran"), frame(None, -1), last=True)

    def bad() -> None:
        raise ValueError("no such weights")

    stream.exclusive(work, bad, frame(None, -1), last=True)
    failed = frame(None, -1)
    assert failed.tail is not None
    failed.tail.error = ValueError("earlier")
    stream.exclusive(work, lambda: log.append("ran"), failed, last=True)
    assert log == ["ran"]
    assert [str(p.error) for p in done[1:]] == ["stage 's' failed at frame -1: ValueError: no such weights", "earlier"]


def test_one_worker() -> None:
    """The loop is one; more workers are refused with the way out."""
    with pytest.raises(ConfigurationError, match='has one worker, not 2; use "cpu:0"'):
        InlineDevice().open(None, workers=2)  # type: ignore[arg-type]


def test_measure() -> None:
    """Measured on the calling thread, in inference mode."""
    seconds, result = InlineDevice().measure(lambda x: torch.is_inference_mode_enabled(), 1, seconds=0.0)
    assert seconds > 0.0
    assert result is True
