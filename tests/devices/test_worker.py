"""Tests of aiotime.devices.worker: order, waiting for upstreams, control frames, time-outs, lending, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from aiotime.devices import worker as worker_module
from aiotime.devices.base import Completions, Pending, Work
from aiotime.devices.worker import WorkerStream
from aiotime.errors import ClosedError, DeadlineExceeded, FrameCancelled, StageError, StageTimeout
from aiotime.frame import Frame

if TYPE_CHECKING:
    from tests.conftest import Settle


class Nobody:
    def settled(self, frame: Frame) -> None: ...


class Bench:
    """Streams on this loop and what they completed, in the order of completion."""

    def __init__(self) -> None:
        self.done: list[Pending] = []
        self.completions = Completions(asyncio.get_running_loop(), self.done.append)
        self.streams: list[WorkerStream] = []
        self.gates: list[threading.Event] = []

    def stream(self, name: str = "cpu:0", *, workers: int = 1) -> WorkerStream:
        stream = WorkerStream(name, self.completions, workers=workers)
        self.streams.append(stream)
        return stream

    def gate(self) -> threading.Event:
        self.gates.append(threading.Event())
        return self.gates[-1]

    async def close(self) -> None:
        for gate in self.gates:
            gate.set()
        for stream in self.streams:
            stream.close()
        for stream in self.streams:
            await stream.join()


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.close()


def work(fn: Callable[[Any], Any], *, timeout: float | None = None) -> Work:
    return Work(fn, stage="stage", index=0, timeout=timeout)


def frame(value: Any, index: int = 0) -> Frame:
    return Frame(Nobody(), index, Pending(value, done=True), 0.0)


def plus(x: int) -> int:
    return x + 1


# ------------------------------------------------------------------------------------------------- ordinary jobs


@pytest.mark.asyncio
async def test_jobs_run_in_launch_order_on_one_thread(bench: Bench, settle: Settle) -> None:
    """Results come back in the order of the launches, computed on a thread that bears the stream's name."""
    threads: set[str] = set()

    def fn(x: int) -> int:
        threads.add(threading.current_thread().name)
        return x + 1

    stream, doubling = bench.stream("cpu:7"), work(fn)
    stream.bind(doubling)
    pendings = [stream.launch(doubling, frame(i, i), last=True) for i in range(200)]
    stream.ring()
    await settle(until=lambda: len(bench.done) == 200)
    assert bench.done == pendings
    assert [p.value for p in pendings] == list(range(1, 201))
    assert threads == {"cpu:7"}
    assert doubling.recorders[0].jobs == 200


@pytest.mark.asyncio
async def test_a_job_waits_for_its_upstream_without_the_loop(bench: Bench, settle: Settle) -> None:
    """A chain of launches over three streams runs through while the loop is looking elsewhere."""
    gate = bench.gate()

    def gated(x: int) -> int:
        gate.wait()
        return x + 1

    works = [work(gated), work(plus), work(plus)]
    streams = [bench.stream(f"cpu:{k}") for k in range(3)]
    for stream, each in zip(streams, works, strict=True):
        stream.bind(each)
    travelling = frame(0)
    for k in range(3):
        travelling.tail = streams[k].launch(works[k], travelling, last=k == 2)
        streams[k].ring()
    assert not travelling.tail.done  # type: ignore[union-attr]
    gate.set()
    await settle(until=lambda: bench.done)
    assert bench.done[0].value == 3


@pytest.mark.asyncio
async def test_workers_run_side_by_side(bench: Bench, settle: Settle) -> None:
    """With three workers three jobs run at once, and the first does not hold up the others."""
    gate, inside = bench.gate(), threading.Semaphore(0)

    def fn(x: int) -> int:
        inside.release()
        if x == 0:
            gate.wait()
        return x

    stream, each = bench.stream(workers=3), work(fn)
    stream.bind(each)
    for i in range(9):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=lambda: len(bench.done) == 8)
    gate.set()
    await settle(until=lambda: len(bench.done) == 9)
    assert bench.done[-1].value == 0
    assert sum(r.jobs for r in each.recorders) == 9
    assert [r.lane for r in each.recorders] == ["cpu:0/0", "cpu:0/1", "cpu:0/2"]


@pytest.mark.asyncio
async def test_an_error_is_a_value(bench: Bench, settle: Settle) -> None:
    """A failed job's error passes through the stages behind it without their being run, and counts once."""
    calls: list[int] = []

    def bad(x: int) -> int:
        raise ValueError("boom")

    first, second = work(bad), work(calls.append)
    streams = bench.stream("a"), bench.stream("b")
    streams[0].bind(first)
    streams[1].bind(second)
    travelling = frame(1, 5)
    travelling.tail = streams[0].launch(first, travelling, last=False)
    streams[0].ring()
    streams[1].launch(second, travelling, last=True)
    streams[1].ring()
    await settle(until=lambda: bench.done)
    error = bench.done[0].error
    assert isinstance(error, StageError)
    assert (error.stage, error.frame) == ("stage", 5)
    assert calls == []
    assert (first.recorders[0].failed, second.recorders[0].failed, second.recorders[0].passed) == (1, 0, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, StopIteration])
async def test_nothing_that_user_code_raises_ends_a_worker(
    bench: Bench, settle: Settle, bad: type[BaseException]
) -> None:
    """Whatever a stage's code raises becomes its frame's error; the next job runs."""

    def fn(x: int) -> int:
        if x == 0:
            raise bad
        return x

    stream, each = bench.stream(), work(fn)
    stream.bind(each)
    for i in range(2):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=lambda: len(bench.done) == 2)
    assert isinstance(bench.done[0].error, StageError)
    assert isinstance(bench.done[0].error.__cause__, bad)
    assert bench.done[1].value == 1


@pytest.mark.asyncio
async def test_unwanted_frames_are_passed_over(bench: Bench, settle: Settle) -> None:
    """A frame that was cancelled or is late when its turn comes is not computed."""
    gate, ran = bench.gate(), []

    def fn(x: int) -> int:
        gate.wait()
        ran.append(x)
        return x

    stream, each = bench.stream(), work(fn)
    stream.bind(each)
    frames = [frame(i, i) for i in range(4)]
    for each_frame in frames:
        stream.launch(each, each_frame, last=True)
    stream.ring()
    frames[1].cancelled = True
    frames[2].deadline = time.perf_counter() - 1.0
    gate.set()
    await settle(until=lambda: len(bench.done) == 4)
    assert ran == [0, 3]
    assert [type(p.error) for p in bench.done] == [type(None), FrameCancelled, DeadlineExceeded, type(None)]


@pytest.mark.asyncio
async def test_an_input_dies_as_soon_as_it_was_used(bench: Bench, settle: Settle) -> None:
    """The upstream's value is let go with the job, not with the frame."""
    stream, each = bench.stream(), work(plus)
    stream.bind(each)
    travelling = frame(1)
    up = travelling.tail
    stream.launch(each, travelling, last=True)
    stream.ring()
    await settle(until=lambda: bench.done)
    assert up is not None
    assert up.value is None


@pytest.mark.asyncio
async def test_the_pulse_announces_what_a_long_job_keeps_back(bench: Bench, settle: Settle) -> None:
    """A result that a busy worker has not announced yet reaches the loop with the next pulse."""
    gate, inside = bench.gate(), threading.Event()

    def fn(x: int) -> int:
        if x == 1:
            inside.set()
            gate.wait()
        return x

    stream, each = bench.stream(), work(fn)
    stream.bind(each)
    for i in range(2):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=inside.is_set)
    stream.pulse(time.perf_counter())
    await settle(until=lambda: bench.done)
    assert [p.value for p in bench.done] == [0]


# -------------------------------------------------------------------------------------------------- control frames


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 3])
async def test_an_exclusive_action_runs_alone_in_its_turn(bench: Bench, settle: Settle, workers: int) -> None:
    """No job runs while an action does; those launched before it see the old state, those behind it the new."""
    state, running, seen, together = [0], [0], [], []
    lock = threading.Lock()

    def fn(x: int) -> int:
        with lock:
            running[0] += 1
        seen.append((x, state[0]))
        with lock:
            running[0] -= 1
        return x

    def action() -> None:
        together.append(running[0])
        state[0] += 1

    stream, each = bench.stream(workers=workers), work(fn)
    stream.bind(each)
    for i in range(50):
        for k in range(4):
            stream.launch(each, frame(i * 4 + k), last=True)
        stream.exclusive(each, action, frame(None, -1), last=True)
    stream.ring()
    await settle(until=lambda: len(bench.done) == 250)
    assert state == [50]
    assert together == [0] * 50
    assert all(version == x // 4 for x, version in seen)


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 3])
async def test_a_failed_action_fails_its_frame_alone(bench: Bench, settle: Settle, workers: int) -> None:
    """What an action raises is the error of its own control frame, told by its cause; the workers go on."""

    def action() -> None:
        raise ValueError("no such weights")

    stream, each = bench.stream(workers=workers), work(plus)
    stream.bind(each)
    for i in range(5):
        stream.exclusive(each, action, frame(None, -1), last=True)
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=lambda: len(bench.done) == 10)
    causes = [p.error.__cause__ for p in bench.done if p.error is not None]
    assert [str(cause) for cause in causes] == ["no such weights"] * 5


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 3])
async def test_an_action_whose_upstream_failed_is_passed_over(bench: Bench, settle: Settle, workers: int) -> None:
    """A control frame that failed on an earlier stage does nothing on this one, and holds up no worker."""
    stream, each = bench.stream(workers=workers), work(plus)
    stream.bind(each)
    control = frame(None, -1)
    assert control.tail is not None
    control.tail.error = ValueError("earlier")
    mine = stream.exclusive(each, lambda: pytest.fail("ran"), control, last=True)
    for i in range(6):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=lambda: len(bench.done) == 7)
    assert str(mine.error) == "earlier"


# ------------------------------------------------------------------------------------------------------- time-outs


@pytest.mark.asyncio
async def test_a_job_that_takes_too_long_is_given_up(bench: Bench, settle: Settle) -> None:
    """Its frame fails, another thread goes on with the next, and the late result goes nowhere."""
    gate, inside, threads = bench.gate(), threading.Event(), []

    def fn(x: int) -> int:
        threads.append(threading.current_thread())
        if x == 0:
            inside.set()
            gate.wait()
            raise ValueError("too late to be heard")
        return x

    stream, each = bench.stream(), work(fn, timeout=60.0)
    stream.bind(each)
    for i in range(3):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=inside.is_set)
    stream.pulse(time.perf_counter() + 59.0)
    await settle()
    assert bench.done == []
    stream.pulse(time.perf_counter() + 61.0)
    await settle(until=lambda: len(bench.done) == 3)
    timeout = bench.done[0].error
    assert isinstance(timeout, StageTimeout)
    assert isinstance(timeout, TimeoutError)
    assert (timeout.stage, timeout.frame) == ("stage", 0)
    assert [p.value for p in bench.done[1:]] == [1, 2]
    gate.set()
    await settle(until=lambda: not threads[0].is_alive())
    assert bench.done[0].error is timeout
    assert (each.recorders[0].jobs, each.recorders[0].failed) == (3, 1)


@pytest.mark.asyncio
async def test_closing_waits_for_the_replacement(bench: Bench, settle: Settle) -> None:
    """The end of a given-up thread is not taken for that of the worker in its place."""
    gates, inside = [bench.gate(), bench.gate()], [threading.Event(), threading.Event()]
    threads: list[threading.Thread] = []

    def fn(x: int) -> int:
        threads.append(threading.current_thread())
        inside[x].set()
        gates[x].wait()
        return x

    stream, each = bench.stream(), work(fn, timeout=60.0)
    stream.bind(each)
    for i in range(2):
        stream.launch(each, frame(i, i), last=True)
    stream.ring()
    await settle(until=inside[0].is_set)
    stream.pulse(time.perf_counter() + 61.0)
    gates[0].set()
    await settle(until=lambda: inside[1].is_set() and not threads[0].is_alive())
    stream.close()
    joining = asyncio.create_task(stream.join())
    await settle()
    assert not joining.done()
    gates[1].set()
    await joining
    assert not threads[1].is_alive()


@pytest.mark.asyncio
async def test_a_thread_that_never_ends_does_not_hold_up_the_closing_for_ever(
    bench: Bench, settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """join() waits for a given-up thread no longer than the grace."""
    monkeypatch.setattr(worker_module, "GRACE", 0.0)
    gate, inside = bench.gate(), threading.Event()

    def fn(x: int) -> None:
        inside.set()
        gate.wait()

    stream, each = bench.stream(), work(fn, timeout=60.0)
    stream.bind(each)
    stream.launch(each, frame(0), last=True)
    stream.ring()
    await settle(until=inside.is_set)
    stream.pulse(time.perf_counter() + 61.0)
    stream.close()
    await asyncio.wait_for(stream.join(), 10)
    assert not gate.is_set()


# --------------------------------------------------------------------------------------------------------- lending


@contextmanager
def alone(lock: threading.Lock) -> Iterator[None]:
    assert lock.acquire(blocking=False), "two threads run one stage at once"
    try:
        yield
    finally:
        lock.release()


@pytest.mark.asyncio
@pytest.mark.parametrize("hosts", [[0, 0], [0, 1], [1, 0]])
async def test_lending_keeps_order_and_exclusivity(bench: Bench, settle: Settle, hosts: list[int]) -> None:
    """While two streams are lent and taken back in mid-stream, no stage runs twice at once or out of order."""
    locks, seen = [threading.Lock() for _ in range(3)], [[], [], []]  # type: ignore[var-annotated]
    threads: set[str] = set()

    def stage(k: int) -> Callable[[int], int]:
        def fn(x: int) -> int:
            with alone(locks[k]):
                threads.add(threading.current_thread().name)
                seen[k].append(x)
                return x

        return fn

    works = [work(stage(k)) for k in range(3)]
    streams = [bench.stream(f"cpu:{k}") for k in range(3)]
    for stream, each in zip(streams, works, strict=True):
        stream.bind(each)
    total = 3000
    for i in range(total):
        travelling = frame(i, i)
        for k in range(3):
            travelling.tail = streams[k].launch(works[k], travelling, last=k == 2)
        if i % 7 == 0:
            for stream in streams:
                stream.ring()
        if i % 20 == 10:
            streams[1].lend(streams[0] if streams[1].host is None else None)
        if i % 30 == 20:
            on_loan = streams[2].host is not None
            streams[2].lend(None if on_loan else streams[hosts[i // 30 % 2]])
        if i % 100 == 0:
            await settle(1)
    for stream in streams:
        stream.ring()
    await settle(until=lambda: len(bench.done) == total)
    assert all(values == list(range(total)) for values in seen)
    assert not [p.error for p in bench.done if p.error is not None]
    assert threads == {"cpu:0", "cpu:1", "cpu:2"}
    assert [each.recorders[0].jobs for each in works] == [total] * 3


@pytest.mark.asyncio
async def test_closing_while_on_loan(bench: Bench, settle: Settle) -> None:
    """Streams that are closed while one runs the other's jobs finish what was launched."""
    streams, works = [bench.stream("a"), bench.stream("b")], [work(plus), work(plus)]
    for stream, each in zip(streams, works, strict=True):
        stream.bind(each)
    streams[1].lend(streams[0])
    for i in range(10):
        travelling = frame(i, i)
        for k in range(2):
            travelling.tail = streams[k].launch(works[k], travelling, last=k == 1)
    for stream in streams:
        stream.close()
    for stream in streams:
        await asyncio.wait_for(stream.join(), 10)
    await settle()
    assert [p.value for p in bench.done] == [i + 2 for i in range(10)]


# --------------------------------------------------------------------------------------------------------- the end


@pytest.mark.asyncio
async def test_a_closed_stream_finishes_its_jobs_and_refuses_new_ones(bench: Bench, settle: Settle) -> None:
    """What was launched settles; a later launch settles at once with ClosedError; closing twice is harmless."""
    gate = bench.gate()
    stream, each = bench.stream(workers=2), work(lambda x: gate.wait() and x)
    stream.bind(each)
    for i in range(5):
        stream.launch(each, frame(i + 1, i), last=True)
    stream.ring()
    stream.close()
    stream.close()
    late = [
        stream.launch(each, frame(9), last=True),
        stream.exclusive(each, lambda: pytest.fail("ran"), frame(9), last=True),
    ]
    assert all(p.done and isinstance(p.error, ClosedError) for p in late)
    gate.set()
    await asyncio.wait_for(stream.join(), 10)
    await settle()
    assert sorted(p.value for p in bench.done if p.error is None) == [1, 2, 3, 4, 5]


@pytest.mark.asyncio
async def test_closing_what_never_ran(bench: Bench) -> None:
    """A stream without work has no threads to end."""
    stream = bench.stream()
    stream.close()
    await asyncio.wait_for(stream.join(), 10)
