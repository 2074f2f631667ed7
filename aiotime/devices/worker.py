"""A device stream driven by worker threads: the job queue, sleeping and waking, time-outs, the end.

    loop:    launch … launch ring        (a burst is launched, then the worker is woken once)
    worker:  pop ▸ upstream done? ▸ passed over? ▸ perform ▸ settle ▸ announce

Waking a thread costs far more than a job of microseconds (25 µs against 3 µs on a virtual machine), and two
awake Python threads fight for the GIL. So a worker keeps its announcements (bells of downstream streams, the
wake-up of the loop) until it runs out of jobs or `COALESCE` seconds have passed; `pulse` bounds that wait
should a job turn out to be long. A stage of milliseconds announces every result at once. And a stream whose
jobs last microseconds may be `lend`-ed to its upstream neighbour: one thread then runs both, in launch order.

What a worker does with one job is `perform`; a subclass for another kind of device overrides that alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

from aiotime.devices.base import (
    SERVED,
    Agenda,
    Bell,
    Completions,
    DeviceStream,
    Job,
    Pending,
    Work,
    passed_over,
    stage_failed,
)
from aiotime.errors import BrokenError, ClosedError, StageTimeout
from aiotime.frame import NOBODY, Frame
from aiotime.observe.meter import Recorder

COALESCE = 200e-6  # seconds that announcements may wait for company
PATIENCE = 2e-3  # the same where every job is shorter than a thread switch
ORPHAN_CHECK = 1.0  # seconds between looks at the main thread while idle
GRACE = 5.0  # seconds that join() waits for a worker that its stage's timeout gave up


class Worker:
    """One thread of a stream; also the bell that wakes it."""

    __slots__ = ("alarm", "bells", "claim", "number", "parker", "retired", "since", "started", "thread")

    def __init__(self, number: int) -> None:
        self.number = number
        self.parker = threading.Lock()
        self.parker.acquire()
        self.bells: deque[Bell] = deque()  # announcements not yet made
        self.since = 0.0  # start of the job that made the first of them
        self.claim: list[Job] = []  # the running job, where a timeout watches it: who pops it settles it
        self.started = 0.0
        self.alarm = inf  # when to look again, set by the agenda that had nothing
        self.retired = False
        self.thread: threading.Thread | None = None

    def ring(self) -> None:
        try:
            self.parker.release()
        except RuntimeError:
            pass  # it has been rung already

    def ring_at(self, when: float) -> None:
        self.alarm = when

    def announce(self) -> None:
        bells = self.bells
        while bells:
            try:
                bell = bells.popleft()
            except IndexError:  # the pulse was faster
                return
            bell.ring()


class WorkerStream(DeviceStream):
    """Jobs start in launch order on ``workers`` threads.

    The threads are not daemons (a daemon that is inside torch aborts the process at exit); while idle
    they look at the main thread and end with it.
    """

    direct = False  # a job on a host value is no more than a call: `perform` may be left out

    def __init__(self, name: str, completions: Completions, *, workers: int = 1) -> None:
        self.name = name
        self.workers = workers
        self._completions = completions
        self._jobs: deque[Job | Agenda | None] = deque()
        self._works: list[Work] = []
        self._idle: list[Worker] = []
        self._crew: list[Worker] = []
        self._given_up: list[Worker] = []
        self._host: WorkerStream | None = None  # the neighbour that runs our jobs while they are short
        self._closed = False
        self._all_gone: asyncio.Future[None] = completions.loop.create_future()
        self._alive = workers
        self.patience = COALESCE  # seconds that announcements may wait; set by who knows how long the jobs are

    # ------------------------------------------------------------------ called on the loop

    def bind(self, work: Work) -> None:
        for number in range(self.workers):
            lane = self.name if self.workers == 1 else f"{self.name}/{number}"
            work.recorders.append(Recorder(work.stage, lane))
        self._works.append(work)
        if not self._crew:
            self._crew = [self._start(number) for number in range(self.workers)]

    def launch(self, work: Work, frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None, "a settled frame is never launched"
        if self._closed:
            return self._refuse(mine)
        stream = self._host or self
        stream._jobs.append((work, up, frame, mine, None))
        if not up.done:
            up.bell = stream
        return mine

    def exclusive(self, work: Work, action: Callable[[], None], frame: Frame, *, last: bool) -> Pending:
        mine = Pending(frame=frame if last else None)
        up = frame.tail
        assert up is not None, "a settled frame is never launched"
        if self._closed:
            return self._refuse(mine)
        act, stream = action, self._host or self
        if self.workers > 1:
            act = alone = _Alone(action, others=self.workers - 1)
            for _ in range(self.workers - 1):
                self._jobs.append((work, Pending(done=True), frame, Pending(), alone.stand))
        stream._jobs.append((work, up, frame, mine, act))
        if not up.done:
            up.bell = stream
        return mine

    def post(self, agenda: Agenda, jobs: int) -> bool:
        if self._closed:
            return False
        self._jobs.extend([agenda] * jobs)
        agenda.poke()
        return True

    def can_lend_to(self, other: DeviceStream) -> bool:
        """Would our jobs run the same on the other stream's worker?"""
        return False

    def lend(self, host: WorkerStream | None) -> None:
        """Have our jobs run on ``host``'s worker from the next launch on; None: on our own again.

        Order is kept: the first of them waits until the last one launched before has run.
        """
        before, after = self._host or self, host or self
        if before is after:
            return
        passed = threading.Event()
        work = self._works[0]
        nobody = Frame(NOBODY, -1, Pending(done=True), 0.0)
        before._jobs.append((work, Pending(done=True), nobody, Pending(), passed.set))
        after._jobs.append((work, Pending(done=True), nobody, Pending(), _until(passed)))
        before.ring()
        self._host = host
        if before is not self:
            before._works = [w for w in before._works if w not in self._works]
        if after is not self:
            after._works = [*after._works, *self._works]

    @property
    def host(self) -> WorkerStream | None:
        """The stream that runs our jobs at present, if it is not this one."""
        return self._host

    def ring(self) -> None:
        """Wake idle workers if the next job can run; any thread. (A job that waits for its upstream has us as bell.)"""
        if self._host is not None:
            self._host.ring()
        idle = self._idle
        if not idle:
            return
        try:
            head = self._jobs[0]
            # with several workers a later job may be ready before the head is
            if not isinstance(head, tuple) or head[1].done or self.workers > 1:
                for _ in range(min(len(self._jobs), len(idle))):
                    idle.pop().ring()
        except IndexError:
            pass  # a worker was faster

    def pulse(self, now: float) -> None:
        for position, worker in enumerate(self._crew):
            if worker.bells:
                worker.announce()
            if worker.claim and worker.started:
                try:
                    job = worker.claim[0]
                except IndexError:
                    continue
                timeout = job[0].timeout  # read before `started`: a job begun meanwhile makes that newer, never older
                if timeout is not None and now - worker.started > timeout:
                    self._give_up(position, worker, job, now)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._crew:
            self._alive = 0
            self._worker_gone(0)
            return
        self._jobs.extend([None] * self.workers)
        for worker in self._crew:
            worker.ring()

    async def join(self) -> None:
        await asyncio.shield(self._all_gone)
        for worker in self._crew:
            # it has said good-bye: its last few instructions; join() would block the loop
            while worker.thread is not None and worker.thread.is_alive():  # noqa: ASYNC110
                await asyncio.sleep(0)
        patience = time.monotonic() + GRACE
        while any(w.thread is not None and w.thread.is_alive() for w in self._given_up):
            if time.monotonic() > patience:
                return  # user code that never returns: its thread ends with it
            await asyncio.sleep(0.001)

    # ------------------------------------------------------------------ called on a worker thread

    def thread_context(self) -> AbstractContextManager[Any]:
        """Entered once by each worker thread (thread counts, inference mode)."""
        return nullcontext()

    def receive(self, up: Pending) -> Any:
        """The upstream's value, where this device can use it."""
        if up.event is not None:
            up.event.synchronize()
        return up.value

    def perform(self, work: Work, up: Pending, mine: Pending, worker: Worker) -> None:
        """Run one job: set ``mine.value`` (and ``mine.event``); may raise."""
        mine.value = work.fn(self.receive(up))

    def _work(self, worker: Worker) -> None:
        jobs, now, completions = self._jobs, time.perf_counter, self._completions
        bells, number, direct = worker.bells, worker.number, self.direct
        try:
            with self.thread_context():
                while True:
                    try:
                        job = jobs.popleft()
                    except IndexError:
                        if not self._park(worker):
                            return
                        continue
                    if not isinstance(job, tuple):
                        job = None if job is None else self._take(worker, job)
                        if job is None:
                            return
                        if job is SERVED:
                            continue
                    work, up, frame, mine, action = job
                    if not up.done:
                        self._await(worker, up)
                    error = up.error
                    if error is None and action is None and (frame.cancelled or frame.deadline is not None):
                        error = passed_over(frame, now)
                    end = 0.0
                    recorder = work.recorders[number]
                    if error is not None:
                        mine.error = error
                        recorder.passed += 1
                        if isinstance(action, _Alone):
                            action.release()
                    elif action is not None:
                        recorder.passed += 1
                        worker.announce()
                        _run_action(action, work, frame, mine)
                    else:
                        start = now()
                        if work.timeout is not None:
                            worker.started = start
                            worker.claim.append(job)
                        try:
                            if direct and up.event is None and not work.grad:
                                mine.value = work.fn(up.value)
                            else:
                                self.perform(work, up, mine, worker)
                        except BrokenError as lost:  # the device that the value came from; not this stage's doing
                            error = lost
                        except BaseException as cause:
                            error = stage_failed(work, frame, cause)
                        end = now()
                        if work.timeout is not None and not _reclaim(worker):
                            return  # given up and counted: another worker has taken this one's place
                        if error is not None:
                            mine.value, mine.error = None, error
                            recorder.failed += 1
                        recorder.add(start, end, frame.index)
                        if not bells:
                            worker.since = start
                    up.value = None  # an activation dies as soon as it has been used
                    mine.done = True
                    bell = mine.bell
                    if bell is not None and bell not in bells:
                        bells.append(bell)
                    if mine.frame is not None or mine.waiter is not None:
                        completions.put(mine)
                        if completions not in bells:
                            bells.append(completions)
                    if bells and (end - worker.since > self.patience or not jobs):
                        worker.announce()
                    del job, work, up, frame, mine, action, error, bell  # hold nothing while asleep
        finally:
            worker.announce()
            if not worker.retired:
                try:
                    completions.loop.call_soon_threadsafe(self._worker_gone, 1)
                except RuntimeError:
                    pass  # the loop is closed: nobody waits

    def _await(self, worker: Worker, up: Pending) -> None:
        worker.announce()
        start = time.perf_counter()
        up.bell = worker
        while not up.done:  # a stale ring may wake us early
            worker.parker.acquire()
        self._idled(worker, start, [True] * len(self._works))

    def _take(self, worker: Worker, agenda: Agenda) -> Job | None:
        """The agenda's next job, once there is one; None when the main thread has ended."""
        job = agenda.take(worker)
        if job is None:
            worker.announce()
            start = time.perf_counter()
            while (job := agenda.take(worker)) is None:
                patience = min(ORPHAN_CHECK, max(0.0, worker.alarm - time.perf_counter()))
                worker.alarm = inf
                if not worker.parker.acquire(timeout=patience) and not threading.main_thread().is_alive():
                    return None
            self._idled(worker, start, [True] * len(self._works))
        return job

    def _park(self, worker: Worker) -> bool:
        """Sleep until there is a job; False when the main thread has ended."""
        worker.announce()
        start, jobs, idle = time.perf_counter(), self._jobs, self._idle
        starved = [work.starved() for work in self._works]
        while not jobs:
            if worker not in idle:
                idle.append(worker)
                continue  # look at the jobs once more: one launched before we were listed rang nobody
            if not worker.parker.acquire(timeout=ORPHAN_CHECK) and not threading.main_thread().is_alive():
                return False
        try:
            idle.remove(worker)
        except ValueError:
            pass  # whoever rang has taken us off the list
        self._idled(worker, start, starved)
        return True

    def _idled(self, worker: Worker, start: float, starved: list[bool]) -> None:
        spent = time.perf_counter() - start
        for work, for_input in zip(self._works, starved, strict=False):
            recorder = work.recorders[worker.number]
            if for_input:
                recorder.idle_input += spent
            else:
                recorder.idle_output += spent

    # ------------------------------------------------------------------ life and end of workers

    def _start(self, number: int) -> Worker:
        worker = Worker(number)
        name = self.name if self.workers == 1 else f"{self.name}/{number}"
        worker.thread = threading.Thread(target=self._work, args=(worker,), name=name)
        worker.thread.start()
        return worker

    def _refuse(self, mine: Pending) -> Pending:
        mine.error, mine.done = ClosedError(f"device stream {self.name} is closed"), True
        if mine.frame is not None:
            self._completions.put(mine)
            self._completions.ring()
        return mine

    def _give_up(self, position: int, worker: Worker, job: Job, now: float) -> None:
        """The running job has taken too long: settle its frame, leave the thread to itself, hire another."""
        try:
            worker.claim.remove(job)
        except ValueError:
            return  # it finished just now, and the next one may have begun
        work, up, frame, mine, _ = job
        worker.retired = True
        mine.error = StageTimeout(
            f"stage {work.stage!r} took longer than {work.timeout} s at frame {frame.index}; its thread was given up",
            stage=work.stage,
            frame=frame.index,
            key=frame.key,
        )
        recorder = work.recorders[worker.number]
        recorder.failed += 1
        recorder.add(worker.started, now, frame.index)
        up.value = None
        mine.done = True
        if mine.bell is not None:
            mine.bell.ring()
        if mine.frame is not None or mine.waiter is not None:
            self._completions.put(mine)
            self._completions.ring()
        self._given_up = [w for w in self._given_up if w.thread is not None and w.thread.is_alive()]
        self._given_up.append(worker)
        self._crew[position] = self._start(worker.number)

    def _worker_gone(self, count: int) -> None:
        self._alive -= count
        if self._alive <= 0 and not self._all_gone.done():
            self._all_gone.set_result(None)


def _reclaim(worker: Worker) -> bool:
    """Take the finished job back from the timeout's watch; False when the watch has given it up."""
    try:
        worker.claim.pop()
    except IndexError:
        return False
    return True


class _Alone:
    """An action during which every other worker of the stream stands still."""

    def __init__(self, action: Callable[[], None], *, others: int) -> None:
        self._action = action
        self._others = others
        self._standing = threading.Semaphore(0)
        self._over = threading.Event()

    def stand(self) -> None:
        """The job of each other worker."""
        self._standing.release()
        self._over.wait()

    def __call__(self) -> None:
        for _ in range(self._others):
            self._standing.acquire()
        try:
            self._action()
        finally:
            self.release()

    def release(self) -> None:
        """Let the others go on; also where the action is passed over."""
        self._over.set()


def _until(passed: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        passed.wait()

    return wait


def _run_action(action: Callable[[], None], work: Work, frame: Frame, mine: Pending) -> None:
    try:
        action()
    except BaseException as cause:
        mine.error = stage_failed(work, frame, cause)
