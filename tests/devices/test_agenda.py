"""`post` on every host device: a token a job, taken when it can run, on the stream's own thread, until the end."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import torch

from aiotime.devices import worker as worker_module
from aiotime.devices.base import Bell, Completions, Device, DeviceStream, Job, Pending, Work
from aiotime.devices.cpu import CpuDevice
from aiotime.devices.inline import InlineDevice
from aiotime.devices.simulated import SimulatedDevice, VirtualClock
from aiotime.errors import StageError
from aiotime.frame import NOBODY, Frame

if TYPE_CHECKING:
    from tests.conftest import Settle


@pytest.fixture(autouse=True)
def no_second_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that missed its bell would be woken by its look at the main thread: not here."""
    monkeypatch.setattr(worker_module, "ORPHAN_CHECK", 1000.0)


class Script:
    """An agenda that gives what it holds, in order, as far as it is ready."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.threads: set[str] = set()
        self._bell: Bell | None = None

    def take(self, bell: Bell) -> Job | None:
        self.threads.add(threading.current_thread().name)
        self._bell = bell
        for _ in range(2):
            if self.jobs and self.jobs[0][1].done:
                self._bell = None
                return self.jobs.popleft()
            if self.jobs:
                self.jobs[0][1].bell = bell
        return None

    def poke(self) -> None:
        if self._bell is not None:
            self._bell.ring()


def make(kind: str) -> Device:
    if kind == "inline":
        return InlineDevice()
    return CpuDevice(0) if kind == "cpu" else SimulatedDevice(0, seconds=1.0, clock=VirtualClock())


class Bench:
    """A stream of some device, the work it does, and what came back."""

    def __init__(self, kind: str) -> None:
        self.done: list[Pending] = []
        self.completions = Completions(asyncio.get_running_loop(), self.done.append)
        self.stream: DeviceStream = make(kind).open(self.completions)
        self.agenda = Script()
        self.works: list[Work] = []

    def work(self, fn: Callable[[Any], Any], **options: Any) -> Work:
        work = Work(fn, stage="stage", index=0, **options)
        self.stream.bind(work)
        self.works.append(work)
        return work

    def add(self, work: Work, up: Pending, *, index: int = 0, action: Callable[[], None] | None = None) -> Pending:
        frame = Frame(NOBODY, index, up, 0.0)
        mine = Pending(frame=frame)
        self.agenda.jobs.append((work, up, frame, mine, action))
        return mine

    def post(self, jobs: int) -> bool:
        posted = self.stream.post(self.agenda, jobs)
        self.stream.ring()
        return posted


@pytest_asyncio.fixture(params=["cpu", "inline", "simulated"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = Bench(request.param)
    yield made
    made.stream.close()
    made.agenda.poke()
    async with asyncio.timeout(10):
        await made.stream.join()


def ready(value: Any) -> Pending:
    return Pending(value, done=True)


@pytest.mark.asyncio
async def test_a_token_is_a_job(bench: Bench, settle: Settle) -> None:
    """As many jobs run as were posted, in the agenda's order, by the stream's one worker."""
    work = bench.work(lambda x: x + 1)
    pendings = [bench.add(work, ready(i), index=i) for i in range(5)]
    assert bench.post(3)
    await settle(until=lambda: len(bench.done) == 3)
    await settle()
    assert bench.done == pendings[:3]
    bench.post(2)
    await settle(until=lambda: len(bench.done) == 5)
    assert [p.value for p in bench.done] == [1, 2, 3, 4, 5]
    assert len(bench.agenda.threads) == 1
    assert work.recorders[0].jobs == 5


@pytest.mark.asyncio
async def test_a_job_that_is_not_ready_is_waited_for(bench: Bench, settle: Settle) -> None:
    """Its upstream rings the bell that the agenda gave it; the loop goes on meanwhile."""
    work = bench.work(lambda x: x + 1)
    up = Pending()
    mine = bench.add(work, up)
    bench.post(1)
    await settle(until=lambda: up.bell is not None)
    assert not mine.done
    up.value, up.done = 1, True
    assert up.bell is not None
    threading.Thread(target=up.bell.ring).start()  # another device's thread
    await settle(until=lambda: bench.done)
    assert mine.value == 2


@pytest.mark.asyncio
async def test_a_job_added_later_answers_an_earlier_token(bench: Bench, settle: Settle) -> None:
    """A poke is enough."""
    work = bench.work(lambda x: x + 1)
    bench.post(2)
    await settle()
    for i in range(2):
        bench.add(work, ready(i))
        bench.agenda.poke()
        await settle(until=lambda i=i: len(bench.done) == i + 1)  # type: ignore[misc]
    assert [p.value for p in bench.done] == [1, 2]


@pytest.mark.asyncio
async def test_an_action_runs_in_place_of_the_work(bench: Bench, settle: Settle) -> None:
    """Between the jobs before and behind it; one that raises fails its own pending."""
    log: list[str] = []
    work = bench.work(lambda x: log.append(x))

    def fails() -> None:
        log.append("action")
        raise ValueError("no")

    bench.add(work, ready("before"))
    failed = bench.add(work, ready(None), action=fails)
    bench.add(work, ready("behind"))
    bench.post(3)
    await settle(until=lambda: len(bench.done) == 3)
    assert log == ["before", "action", "behind"]
    assert isinstance(failed.error, StageError)


@pytest.mark.asyncio
async def test_errors_pass_by(bench: Bench, settle: Settle) -> None:
    """A job that raises, one whose upstream failed, one of a cancelled frame: settled, and the next one runs."""

    def picky(x: int) -> int:
        if x == 1:
            raise ValueError("no")
        return x

    work = bench.work(picky)
    raising, failed, cancelled = ready(1), ready(2), ready(3)
    failed.error = ValueError("upstream")
    pendings = [bench.add(work, up) for up in (raising, failed, cancelled, ready(4))]
    bench.agenda.jobs[2][2].cancelled = True
    bench.post(4)
    await settle(until=lambda: len(bench.done) == 4)
    assert [type(p.error).__name__ for p in pendings] == ["StageError", "ValueError", "FrameCancelled", "NoneType"]
    assert pendings[3].value == 4


@pytest.mark.asyncio
async def test_work_that_wants_gradients_gets_them(bench: Bench, settle: Settle) -> None:
    """Out of inference mode for such a job alone."""
    if isinstance(bench.stream, type(make("simulated").open(bench.completions))):
        pytest.skip("a simulated device runs on the loop, in no mode of its own")
    modes: list[bool] = []

    def look(x: Any) -> None:
        modes.append(torch.is_inference_mode_enabled())

    plain, grad = bench.work(look), bench.work(look, grad=True)
    for work in (plain, grad, plain):
        bench.add(work, ready(None))
    bench.post(3)
    await settle(until=lambda: len(bench.done) == 3)
    assert modes == [True, False, True]


@pytest.mark.asyncio
async def test_what_was_posted_is_answered_before_the_end(bench: Bench, settle: Settle) -> None:
    """Closed, it takes no more tokens, and ends when those it has were given their jobs."""
    work = bench.work(lambda x: x + 1)
    up = Pending()
    mine = bench.add(work, up)
    bench.post(1)
    await settle(until=lambda: up.bell is not None)
    bench.stream.close()
    assert bench.post(1) is False
    joining = asyncio.ensure_future(bench.stream.join())
    await settle()
    assert not joining.done()
    up.value, up.done = 1, True
    up.bell.ring()  # type: ignore[union-attr]
    async with asyncio.timeout(10):
        await joining
    assert mine.value == 2


@pytest.mark.asyncio
async def test_a_job_rings_whoever_waits_for_it(bench: Bench, settle: Settle) -> None:
    """A gradient is settled on one stream and wakes another."""
    rung = threading.Event()

    class Waiting:
        def ring(self) -> None:
            rung.set()

    work = bench.work(lambda x: x)
    mine = bench.add(work, ready(1))
    mine.bell = Waiting()
    bench.post(1)
    await settle(until=rung.is_set)
    assert mine.done
