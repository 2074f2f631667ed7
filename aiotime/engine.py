"""An open pipeline on one loop: streams, stage tasks, the door, and the one place where a frame ends.

    door ──credit──▶ stage 0 ──▶ stage 1 ──▶ … ──completion──▶ settle: outcome, credit back, owner told

Runs and requests own frames; the engine knows them only as `Owner`. It lives from `open` to `close`;
a pipeline that is opened again gets a new one.

Longer than most modules: opening, entering, settling and closing share one state, and the rules that keep credits and
frames from being lost are read together.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import Any

from aiotime.batching.desk import Batching
from aiotime.batching.desk import Desk as BatchDesk
from aiotime.batching.gathering import Gathering
from aiotime.devices.base import Clock, Completions, Device, DeviceStream, Pending, Work
from aiotime.devices.worker import COALESCE, PATIENCE, WorkerStream
from aiotime.errors import AiotimeError, BrokenError, BusyError, ClosedError
from aiotime.frame import NOBODY, Control, Frame, Owner, Prediction
from aiotime.ingest.door import Door
from aiotime.ingest.entrance import Guest
from aiotime.learning.chimera import Crossing, Fork, ReplicaDesk, ReplicaLearner
from aiotime.learning.course import Barrier, Course
from aiotime.learning.desk import Agenda, Desk, Hands
from aiotime.learning.meeting import MeetingDesk
from aiotime.learning.rule import Rule
from aiotime.learning.taps import TapDesk
from aiotime.observe.log import get_logger
from aiotime.observe.meter import Ring, Tracer
from aiotime.stage import StageRunner, StageSpec

BEAT = 0.005  # seconds between looks at timeouts and announcements, while frames are in flight
DEEPEST = 64  # launches in flight per worker for stages of microseconds
SHALLOWEST = 2  # and for heavy ones
RAREST = 16  # beats between two looks at what the stages take
SHORT = 50e-6  # seconds; below this a job costs less than the thread switch to it
RECENT = 33  # newest jobs that a stage's time is the median of
WORK_AHEAD = 4e-3  # seconds of launches in flight that an adaptive depth aims at; with less, 0.1 ms stages starve

log = get_logger()


def mean_batch(work: Work) -> float:
    """Frames per job so far."""
    if work.tally is None or not (jobs := sum(recorder.jobs for recorder in work.recorders)):
        return 1.0
    return 1.0 + work.tally.joined / jobs


def depth_for(seconds: float) -> int:
    """Launches in flight per worker for a stage that takes ``seconds``: heavy ones two, microseconds tens."""
    if seconds <= 0:
        return DEEPEST
    return max(SHALLOWEST, min(DEEPEST, int(WORK_AHEAD / seconds)))


class Engine:
    """Stages open on the running loop.

    Args:
        depth: launches in flight per worker; None: adapted to the measured stage times.
        frames: the budget of frames in flight; None: depth x workers.
        nbytes: the budget of payload bytes in flight; None: no limit.
        first_guess: seconds of the slowest stage, where a plan knows; starts an adaptive depth.
        rule: how the stages that have ``hands`` learn.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        *,
        name: str,
        depth: int | None,
        frames: int | None,
        nbytes: int | None,
        clock: Clock,
        first_guess: float | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.name = name
        self.course = None if rule is None else Course(rule, len(specs), asyncio.get_running_loop())
        self.specs = list(specs)
        self.clock = clock
        self.now = clock.now
        self.loop = asyncio.get_running_loop()
        self.adaptive = depth is None
        self.own_budget = frames is not None
        self.depth = depth if depth is not None else depth_for(first_guess) if first_guess else 4
        self.door = Door(frames or self._budget_for(self.depth), nbytes)
        self.completions = Completions(self.loop, self._completed)
        self.frames: set[Frame] = set()
        self.stages: list[StageRunner] = []
        self.streams: list[DeviceStream] = []
        self.error: AiotimeError | None = None  # why nothing more is accepted
        self.draining = False
        self.opened = clock.now()
        self.latencies = Ring()
        self.tracer: Tracer | None = None
        self.undelivered = 0.0  # frame-seconds that results waited for their consumer
        self.entered = 0
        self.accepted = 0  # frames, not controls, that went in
        self.newest: Hashable = None  # the key of the newest of them
        self.counts = {"in": 0, "out": 0, "shed": 0, "failed": 0}
        self.runs: set[Guest] = set()
        self._idle: list[asyncio.Future[None]] = []
        self._holders: list[asyncio.Task[Any] | None] = []
        self._held_back: list[asyncio.Future[None]] = []  # who waits for the last of them
        self._beating = False
        self._closed = False
        self._seen: list[int] = []
        self._pause = 1  # beats between two looks at what the stages take
        self._until_look = 0
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._crossing: Crossing | None = None  # of a pipeline in two directions
        self._gatherings: list[Gathering] = []  # of stages where frames wait for company
        self._open_streams()
        self._inbox = self.stages[0].inbox

    # ------------------------------------------------------------------ life

    def _open_streams(self) -> None:
        shared: dict[tuple[str, str], DeviceStream] = {}
        agendas: dict[DeviceStream, Agenda] = {}
        try:
            for index, spec in enumerate(self.specs):
                following = self.specs[index + 1].device if index + 1 < len(self.specs) else None
                stream = self._stream_for(spec, shared)
                desk = self._desk(spec, index, stream, agendas)
                host_output = following is None or following.on_host
                if desk is not None:
                    desk.works[0].host_output = host_output
                works = desk.works if desk is not None else (
                    Work(
                        spec.fn,
                        stage=spec.name,
                        index=index,
                        workers=spec.workers,
                        timeout=spec.timeout,
                        host_output=host_output,
                    ),
                )  # fmt: skip
                for work in works:
                    work.starved = self._starved(works[0])
                    stream.bind(work)
                runs = self._fork(spec, index, desk, shared, agendas)
                if spec.batching is not None:
                    stream = self._gathering(spec.batching, works[0], stream, index)
                limit = spec.launches(self.depth, adaptive=self.adaptive)
                self.stages.append(StageRunner(spec, works[0], stream, limit, self.ready, runs))
                self._seen.append(0)
        except BaseException:
            for stream in self.streams:
                stream.close()
            raise

    def _stream_for(self, spec: StageSpec, shared: dict[tuple[str, str], DeviceStream]) -> DeviceStream:
        device = spec.device
        key = (device.name, device.speed_class)
        if spec.workers == 1 and device.shares_stream and key in shared:
            return shared[key]
        label = device.name if device.shares_stream and spec.workers == 1 else f"{spec.name}@{device.name}"
        stream = device.open(self.completions, workers=spec.workers, label=label)
        self.streams.append(stream)
        if spec.workers == 1 and device.shares_stream:
            shared[key] = stream
        return stream

    def _gathering(self, batching: Batching, work: Work, stream: DeviceStream, index: int) -> Gathering:
        """What stands before ``stream`` where frames wait for company."""

        def alone(waiting: int) -> bool:
            if waiting >= self.stages[index].limit:
                return True
            return waiting >= len(self.frames) and (self.draining or self.door.used >= self.door.frames)

        desk = BatchDesk(
            batching,
            work,
            now=self.now,
            completions=self.completions,
            on_host=self.specs[index].device.on_host,
            alone=alone,
        )
        gathering = Gathering(stream, desk, burst=batching.most)
        self._gatherings.append(gathering)
        return gathering

    def _desk(
        self, spec: StageSpec, index: int, stream: DeviceStream, agendas: dict[DeviceStream, Agenda]
    ) -> Desk | None:
        """For a stage that learns: what decides the order of its jobs."""
        if self.course is None or spec.hands is None or spec.order is None:
            return None
        kind: type[Desk] = TapDesk if spec.order.taps else Desk
        if spec.order.meet:
            kind = MeetingDesk if spec.replica is None else ReplicaDesk
        return self._open_desk(kind, spec.hands, spec, index, stream, agendas, [each.device for each in self.specs])

    def _fork(
        self,
        spec: StageSpec,
        index: int,
        desk: Desk | None,
        shared: dict[tuple[str, str], DeviceStream],
        agendas: dict[DeviceStream, Agenda],
    ) -> Desk | Fork | None:
        """Where a stage has a replica: a desk for that, and what stands for both."""
        replica = spec.replica
        if replica is None or not isinstance(desk, ReplicaDesk):
            return desk
        stream = self._stream_for(dataclasses.replace(spec, device=replica.device), shared)
        devices = [each.device if each.replica is None else each.replica.device for each in self.specs]
        up = self._open_desk(ReplicaDesk, replica.hands, spec, index, stream, agendas, devices)
        assert isinstance(up, ReplicaDesk) and isinstance(spec.hands, ReplicaLearner)
        replica.hands.mirror(spec.hands.show())  # the first may have been loaded while nothing was open
        up.works[0].host_output = index + 1 == len(devices) or devices[index + 1].on_host
        for work in up.works:
            work.starved = self._starved(up.works[0])
            stream.bind(work)
        if self._crossing is None:
            assert desk.order.batch is not None
            self._crossing = Crossing(2 * desk.order.batch)
        return Fork(self._crossing, desk, up, stream)

    def _open_desk(
        self,
        kind: type[Desk],
        hands: Hands,
        spec: StageSpec,
        index: int,
        stream: DeviceStream,
        agendas: dict[DeviceStream, Agenda],
        devices: Sequence[Device],
    ) -> Desk:
        assert self.course is not None and spec.order is not None
        hands.reset()
        desk = kind(
            hands,
            spec.order,
            stage=spec.name,
            index=index,
            stages=len(self.specs),
            agenda=agendas.setdefault(stream, Agenda()),
            host_below=index > 0 and devices[index - 1].on_host,
            failed=self.course.backward_failed(spec.name),
        )
        if hands.learns:
            self.course.add(desk, stream)
        else:
            desk.works[0].timeout = spec.timeout
        return desk

    def start(self) -> None:
        """Start the stage tasks."""
        self._task = self.loop.create_task(self._supervise(), name=f"pipeline:{self.name}")
        log.info("pipeline.opened", pipeline=self.name, stages=[s.name for s in self.specs])

    async def _supervise(self) -> None:
        why: AiotimeError = ClosedError(f"pipeline {self.name!r} was closed")
        try:
            async with asyncio.TaskGroup() as group:
                for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
                    group.create_task(
                        stage.serve(following.inbox if following else None),
                        name=f"stage:{stage.spec.name}@{stage.spec.device.name}",
                    )
        except* Exception as group_error:  # noqa: BLE001 - told to everybody who waits
            first = group_error.exceptions[0]
            why = BrokenError(f"a stage task of pipeline {self.name!r} died: {type(first).__name__}: {first}")
            why.__cause__ = first
            log.error("pipeline.broken", pipeline=self.name, error=repr(first))
        finally:  # every frame and every entrant that was ever accepted is told
            self.end(why)
            for stream in self.streams:
                stream.close()

    def end(self, why: AiotimeError) -> None:
        """Accept nothing more; what is in flight settles with ``why``."""
        if self.error is None:
            self.error = why
        for stage in self.stages:
            stage.inbox.abort(self.error)
        for gathering in self._gatherings:
            gathering.hurry()
        if self.course is not None:
            self.course.abort(self.error)
        for entrant in self.door.withdraw_all():
            entrant.refused(self.error)
        for frame in list(self.frames):
            frame.cancelled = True
            self.settle(frame, self.error)
        self._tell_let_go()
        for run in list(self.runs):  # one that has nothing here now would wait for its source
            run.refused(self.error)

    async def close(self) -> None:
        """End every task and thread. Cancelled: goes on in the background. Idempotent."""
        if self._closing is None:
            self._closing = self.loop.create_task(self._close(), name=f"close:{self.name}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.end(ClosedError(f"pipeline {self.name!r} was closed"))
        for stream in self.streams:
            stream.close()
        for stream in self.streams:
            await stream.join()
        if self.course is not None:
            self.course.forget()
        self._closed = True
        log.info("pipeline.closed", pipeline=self.name, **self.counts)

    # ------------------------------------------------------------------ frames

    def new_frame(self, owner: Owner, index: int, payload: Any) -> Frame:
        """A frame that arrives now; it has taken no credit yet."""
        return Frame(owner, index, Pending(payload, done=True), self.now())

    def enter(self, frame: Frame) -> None:
        """A credit was granted: the frame goes in. No await between the two."""
        if self.error is not None:
            self.frames.add(frame)
            self.settle(frame, self.error)
            return
        self.frames.add(frame)
        self.entered += 1
        if frame.control is None:
            self.accepted += 1
            self.newest = frame.key
            if frame.ticket is not None and frame.ticket.late:
                assert self.course is not None
                self.course.expect(frame.ticket)
        self._inbox.put_nowait(frame)
        if not self._beating:
            self._beating = True
            self.loop.call_later(BEAT, self._beat)

    def enter_control(self, control: Control, owner: Owner) -> Frame:
        """A control frame travels in order and takes no credit of the budget."""
        frame = self.new_frame(owner, -1, None)
        frame.control = control
        self.door.used += 1
        self.enter(frame)
        return frame

    def _completed(self, pending: Pending) -> None:
        waiter = pending.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        frame = pending.frame
        if frame is not None:
            if pending.event is None or pending.error is not None:
                frame.value, pending.value = pending.value, None  # a stage may remember the pending a while
                self.settle(frame, pending.error)
            else:
                self._when_passed(pending, frame)

    def _when_passed(self, pending: Pending, frame: Frame) -> None:
        from aiotime.devices.poller import Poller  # an accelerator is in use: its module is loaded already

        def passed(error: BaseException | None) -> None:
            frame.value, pending.value = pending.value, None
            self.settle(frame, error)

        assert pending.event is not None
        Poller.of(self.loop).watch(pending.event, passed)

    async def ready(self, pending: Pending) -> None:
        """Wait until the host may read ``pending`` (its value or its error)."""
        if not pending.done:
            await pending.finished()
        if pending.event is not None and pending.error is None:
            from aiotime.devices.poller import Poller

            passed: asyncio.Future[None] = self.loop.create_future()

            def tell(error: BaseException | None) -> None:
                pending.error = pending.error or error
                if not passed.done():
                    passed.set_result(None)

            Poller.of(self.loop).watch(pending.event, tell)
            await passed

    def settle(self, frame: Frame, error: BaseException | None) -> None:
        """The one place where a frame ends: outcome, credit, owner. The first outcome wins."""
        if frame.settled:
            return
        frame.settled = True
        frame.error = error
        frame.tail = None
        frame.latency = self.now() - frame.arrived
        if error is None and frame.control is None:
            self.latencies.add(frame.latency)
        self.frames.discard(frame)
        self.door.release(frame.nbytes)
        if not self.frames:
            if self._idle:
                self._tell_idle()
            if self.course is not None and frame.control is None:
                self.course.quiet(self._flush_idle)
        owner, frame.owner = frame.owner, NOBODY  # a request and its frame must not wait for the garbage collector
        owner.settled(frame)

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self.frames:
            future: asyncio.Future[None] = self.loop.create_future()
            self._idle.append(future)
            await future

    async def flush(self) -> None:
        """Wait until every frame that entered so far has been learned from."""
        if self.course is None or self.error is not None:
            return
        barrier = Barrier(self.loop.create_future())
        self.enter_control(barrier, barrier)
        assert barrier.done is not None
        await asyncio.shield(barrier.done)

    def hold(self, by: asyncio.Task[Any] | None) -> None:
        """Admit nothing, and take no late targets, until `let_go`; what is in flight goes on."""
        self._holders.append(by)
        self.door.held += 1

    def let_go(self, by: asyncio.Task[Any] | None) -> None:
        """Undo one `hold`."""
        if by in self._holders:
            self._holders.remove(by)
            self.door.held -= 1
            self._tell_let_go()
            self.door.pump()

    def _tell_let_go(self) -> None:
        if not self.door.held or self.error is not None:
            for future in self._held_back:
                if not future.done():
                    future.set_result(None)
            self._held_back.clear()

    async def until_let_go(self) -> None:
        """Wait until nobody holds it.

        Raises:
            BusyError: the waiting task itself does.
        """
        while self.door.held and self.error is None:
            self.check_not_held()
            future: asyncio.Future[None] = self.loop.create_future()
            self._held_back.append(future)
            await future

    def check_not_held(self) -> None:
        """Raise `BusyError` where the running task would wait for itself."""
        if self._holders and asyncio.current_task() in self._holders:
            raise BusyError(
                f"pipeline {self.name!r} stands still for this very task: leave the 'async with pipeline.frozen()' "
                "block first, or use the model it gave you"
            )

    def _flush_idle(self) -> None:
        if self.error is None and not self.frames:
            barrier = Barrier()
            self.enter_control(barrier, barrier)

    def prediction(self, frame: Frame, index: int, gap: int) -> Prediction:
        """What the consumer gets of a settled frame."""
        ticket = frame.ticket
        if ticket is None:
            return Prediction(frame.value, index, frame.key, None, None, frame.latency, gap, frame.target)
        output, loss = frame.value
        loss = None if loss is None else float(loss)  # on the host by now
        return Prediction(output, index, frame.key, loss, tuple(ticket.delays), frame.latency, gap, frame.target)

    def _tell_idle(self) -> None:
        for future in self._idle:
            if not future.done():
                future.set_result(None)
        self._idle.clear()

    # ------------------------------------------------------------------ the beat

    def _beat(self) -> None:
        now = time.perf_counter()
        for stream in self.streams:
            stream.pulse(now)
        if self.error is not None:  # jobs that still run keep their time-outs
            self._beating = not self._closed
            if self._beating:
                self.loop.call_later(BEAT, self._beat)
            return
        if self.tracer is not None:
            self._trace_queues(self.tracer)
        self._until_look -= 1
        if self._until_look <= 0:
            # often at first, when depth and sharing are found; then rarely, as looking costs what a small job costs
            self._pause = min(2 * self._pause, RAREST)
            self._until_look = self._pause
            times = self._times()
            self._share_threads(times)
            if self.adaptive and any(times):
                each = zip(times, self.stages, strict=True)
                self._adapt(max(t / stage.spec.workers / mean_batch(stage.work) for t, stage in each))
        self._beating = bool(self.frames)
        if self._beating:
            self.loop.call_later(BEAT, self._beat)

    def _times(self) -> list[float]:
        """Per stage: median seconds of its newest jobs; 0.0 where nothing ran since the last look."""
        times = []
        for position, stage in enumerate(self.stages):
            jobs = sum(r.jobs for r in stage.work.recorders)
            newest = stage.work.recorders[0].service.newest(RECENT)
            times.append(median(newest) if jobs > self._seen[position] and newest else 0.0)
            self._seen[position] = jobs
        return times

    def _share_threads(self, times: list[float]) -> None:
        """Neighbours whose jobs are shorter than a thread switch run on one worker, until they grow."""
        if self.course is not None:
            return  # a desk's jobs stay on the worker that its agenda rings
        host: WorkerStream | None = None
        host_seconds = 0.0
        for stage, seconds in zip(self.stages, times, strict=True):
            stream = stage.stream
            if not isinstance(stream, WorkerStream) or stage.spec.timeout is not None:
                host = None
                continue
            if stream.host is None and host is not None and stream.can_lend_to(host):
                if 0.0 < seconds < SHORT and 0.0 < host_seconds < SHORT:
                    stream.lend(host)
            elif stream.host is not None and (stream.host is not host or max(seconds, host_seconds) > 2 * SHORT):
                stream.lend(None)
            if stream.host is None:
                host, host_seconds = stream, seconds
        patience = PATIENCE if 0.0 < max(times) < SHORT else COALESCE
        for each in self.streams:
            if isinstance(each, WorkerStream):
                each.patience = patience

    def _adapt(self, slowest: float) -> None:
        """Set the depth by what the slowest stage takes."""
        depth = depth_for(slowest)
        if depth != self.depth:
            self.depth = depth
            for stage in self.stages:
                stage.limit = stage.spec.launches(depth, adaptive=True)
            if not self.own_budget:
                self.door.resize(self._budget_for(depth), self.door.nbytes)

    def _budget_for(self, depth: int) -> int:
        return sum(spec.launches(depth, adaptive=self.adaptive) for spec in self.specs)

    def _starved(self, work: Work) -> Callable[[], bool]:
        """Is a stage without work waiting for input, or are all credits held by frames that have passed it?"""

        def starved() -> bool:
            done = sum(r.jobs + r.passed for r in work.recorders)
            if work.tally is not None:
                done += work.tally.joined + work.tally.passed
            return self.entered > done or not self.door.full

        return starved

    def set_budget(self, frames: int | None, nbytes: int | None) -> None:
        """Change the limits now; ``frames=None``: depth x workers."""
        self.own_budget = frames is not None
        self.door.resize(frames or self._budget_for(self.depth), nbytes)

    # ------------------------------------------------------------------ observation

    def reset_counters(self) -> None:
        """Forget what the devices did so far; the counts of frames stay."""
        self.latencies = Ring()
        self.undelivered = 0.0
        self.opened = self.now()
        for position, stage in enumerate(self.stages):
            for work in stage.works:
                for recorder in work.recorders:
                    recorder.reset()
                if work.tally is not None:
                    work.tally.reset()
            if stage.desk is not None:
                stage.desk.delays.clear()
            self._seen[position] = 0
        self.entered = self.accepted = 0
        self.newest = None

    def _trace_queues(self, tracer: Tracer) -> None:
        at = self.now()
        tracer.counter("in flight", at, len(self.frames))
        tracer.counter("waiting at the door", at, self.door.waiting)
        for stage in self.stages:
            tracer.counter(f"queue of {stage.spec.name}", at, len(stage.inbox) + len(stage.launched))

    def trace_into(self, tracer: Tracer | None) -> None:
        """Write slices of all device streams and of the loop into ``tracer``; None stops."""
        self.tracer = self.completions.tracer = tracer
        for stage in self.stages:
            for work in stage.works:
                for recorder in work.recorders:
                    recorder.tracer = tracer
