"""Floor: an open network on one loop: its device streams, stations, instances, and how all of that ends.

session ── begin ──▶ coroutine: forward ▸ loss ▸ retrace ▸ settle
                        │ await stage(x)                ▲ every call is over
                        ▼                               │
                     stations on lanes ── device streams ──▶ completions
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from aiotime.devices.base import Clock, Completions, Pending, Work
from aiotime.devices.worker import WorkerStream
from aiotime.dynamic.average import Averaging
from aiotime.dynamic.batch import Batch
from aiotime.dynamic.call import Call
from aiotime.dynamic.entry import Entry
from aiotime.dynamic.instance import Instance, Walk, walk
from aiotime.dynamic.journey import live
from aiotime.dynamic.lane import Lane
from aiotime.dynamic.path import Visit
from aiotime.dynamic.stage import Stage
from aiotime.dynamic.station import Station
from aiotime.errors import (
    AiotimeError,
    BusyError,
    ClosedError,
    ConfigurationError,
)
from aiotime.frame import NOBODY, Frame
from aiotime.ingest.entrance import Guest
from aiotime.learning.enrolment import check_shared, warn_of_batch_norm
from aiotime.learning.learner import Site, nothing_to_learn
from aiotime.observe.log import get_logger
from aiotime.observe.meter import Ring, Tracer

if TYPE_CHECKING:
    from aiotime.dynamic.lesson import Lesson
    from aiotime.dynamic.network import Network

BEAT = 0.005  # seconds between looks at announcements that a device stream holds back

log = get_logger()

Settled = Callable[[Batch, Any, BaseException | None], None]


class Job(Frame):
    """A batch on a device stream, as that sees it."""

    __slots__ = ("batch", "lane", "then")

    def __init__(self, batch: Batch | None, lane: Lane, then: Settled, number: int, value: Any, now: float) -> None:
        super().__init__(NOBODY, number, Pending(value, done=True), now)
        self.batch = batch
        self.lane = lane
        self.then = then


class Floor:
    """Stages open on the running loop.

    Args:
        network: whose forward the instances run.
        stages: by name.
        clock: of its devices.
    """

    def __init__(self, network: Network, stages: Sequence[tuple[str, Stage]], *, name: str, clock: Clock) -> None:
        self.network = network
        self.name = name
        self.now = clock.now
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.completions = Completions(self.loop, self._completed)
        self.lanes: list[Lane] = []
        self.stations: list[Station] = []
        self.by_stage: dict[Stage, list[Station]] = {}
        self.runs: set[Guest] = set()
        self.counts = {"in": 0, "out": 0, "shed": 0, "failed": 0}
        self.latencies = Ring()
        self.entries: set[Entry] = set()
        self.error: AiotimeError | None = None
        self.draining = False
        self.predecessor: Floor | None = None  # of the same stages, still closing
        self.opened = self.now()
        self.tracer: Tracer | None = None
        self.lessons: list[Lesson] = []  # of the runs under way
        self.unused: dict[str, int] = {}  # stage -> instances that did not use all its results
        self.routed = 0  # instances sent to a replica so far
        self.jobs = 0  # launched and not settled
        self._quiet: list[asyncio.Future[None]] = []
        self._walks: list[Walk] = []  # from losses, in the next turn of the loop
        self._beating = False
        self._closing: asyncio.Task[None] | None = None
        self._open(stages)
        self.averaging = {stage: Averaging(self, own) for stage, own in self.by_stage.items() if len(own) > 1}

    def _open(self, stages: Sequence[tuple[str, Stage]]) -> None:
        shared: dict[tuple[str, str], Lane] = {}
        try:
            for name, stage in stages:
                own = self.by_stage[stage] = []
                for number, replica in enumerate(stage.replicas):
                    replica.place()
                    device = replica.device
                    assert device is not None
                    label = name if len(stage.replicas) == 1 else f"{name}/{number}"
                    key = (device.name, device.speed_class)
                    lane = shared.get(key) if device.shares_stream else None
                    if lane is None:
                        stream = device.open(
                            self.completions, label=device.name if device.shares_stream else f"{label}@{device.name}"
                        )
                        if isinstance(stream, WorkerStream):
                            stream.patience = 0.0  # somebody waits for every batch
                        lane = shared[key] = Lane(self, stream)
                        self.lanes.append(lane)
                    station = Station(self, stage, label, replica, lane, len(self.stations))
                    self.stations.append(station)
                    own.append(station)
        except BaseException:
            for lane in self.lanes:
                lane.stream.close()
            raise

    # ------------------------------------------------------------------ instances

    def begin(self, entry: Entry) -> None:
        """Start an instance's coroutine."""
        session = entry.session
        if self.error is not None:
            session.settle(entry, self.error)
            return
        self.entries.add(entry)
        lesson = session.lesson
        if lesson is not None and lesson.supervised and entry.target is None:
            lesson = None  # predict only
        entry.instance = Instance(self, entry, lesson, recorded=session.recorded)
        entry.task = self.loop.create_task(
            live(self, entry, entry.instance), name=f"instance:{self.name}:{entry.index}"
        )

    def turn_soon(self, loss: Walk) -> None:
        """Take the gradient of an instance's loss back, together with those of all whose forward ends in this turn."""
        if not self._walks:
            self.loop.call_soon(self._turn)
        self._walks.append(loss)

    def _turn(self) -> None:
        walks, self._walks = self._walks, []
        walk(walks)
        for instance, _, _, _ in walks:
            instance.turn()

    def call(self, instance: Instance, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One ``stage(x)`` of an instance: the future of its result."""
        stations = self.by_stage.get(stage)
        if stations is None:
            raise ConfigurationError(
                f"stage {stage.name!r} is no part of network {self.name!r}: keep it as an attribute of the network (or "
                "in a list or dict there) before the network is opened"
            )
        if instance.lesson is not None and (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
            raise ConfigurationError(
                f"stage {stage.name!r} was called for learning while autograd is off. torch.no_grad() and "
                "inference_mode() belong to the thread, so around an await they hit every coroutine of the loop: use "
                ".detach() in forward, and keep them out of 'async for' around network.learn"
            )
        station = stations[0] if len(stations) == 1 else self._route(instance, stations)
        call = Call(station, instance, args, kwargs)
        instance.admit(call)
        call.asked = self.now()
        call.future = self.loop.create_future()
        station.inbox.put(call)
        station.lane.arrived()
        if not self._beating:
            self._beating = True
            self.loop.call_later(BEAT, self._beat)
        return call.future

    def _route(self, instance: Instance, stations: list[Station]) -> Station:
        """An instance stays with one replica, so that its gradients meet the weights of its forwards."""
        if instance.route is None:
            instance.route, self.routed = self.routed, self.routed + 1
        return stations[instance.route % len(stations)]

    # ------------------------------------------------------------------ lessons

    def prepare(self, lesson: Lesson) -> asyncio.Future[None] | None:
        """Have every station ready for ``lesson``; a future where work is under way meanwhile.

        Raises:
            ConfigurationError: nothing to learn, or an optimizer that does not fit.
            BusyError: another run is learning in another way.
        """
        sites = [station.site(len(self.stations)) for station in self.stations]
        trainable = [any(p.requires_grad for _, root in site.modules for p in root.parameters()) for site in sites]
        if not any(trainable):
            raise nothing_to_learn([station.name for station in self.stations])
        check_shared(sites)
        todo = [
            (station, site)
            for station, site in zip(self.stations, sites, strict=True)
            if station.hands is None or not station.hands.goes_on(lesson)
        ]
        if any(not lesson.equals(other) for other in self.lessons):
            raise BusyError(
                f"network {self.name!r} is learning with other settings at the moment; let that run end first"
            )
        warn_of_batch_norm([site for station, site in todo if station.hands is None])
        if not self.jobs:
            for station, site in todo:
                station.enrol(site, lesson)
            todo = []
        self.lessons.append(lesson)
        if not todo:
            return None
        return asyncio.ensure_future(self._enrol(todo, lesson))

    def lesson_over(self, lesson: Lesson | None) -> None:
        """A run has ended."""
        if lesson is not None:
            self.lessons = [other for other in self.lessons if other is not lesson]

    async def _enrol(self, todo: Sequence[tuple[Station, Site]], lesson: Lesson) -> None:
        """On each station's own stream, between two jobs."""
        await self.act_on([(station, partial(station.enrol, site, lesson)) for station, site in todo])

    async def act_on(self, actions: Sequence[tuple[Station, Callable[[], None]]]) -> None:
        """Run each action on its station's device stream; raises the first error."""
        futures: list[asyncio.Future[None]] = []
        for station, action in actions:
            future: asyncio.Future[None] = self.loop.create_future()
            futures.append(future)

            def then(_: Any, __: Any, error: BaseException | None, future: asyncio.Future[None] = future) -> None:
                if future.done():
                    return
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error.__cause__ or error)

            self.act(station, action, then)
        await asyncio.gather(*futures)

    # ------------------------------------------------------------------ jobs

    def launch(self, station: Station, work: Work, batch: Batch, value: Any, then: Settled) -> None:
        """Queue a batch on its device stream."""
        job = Job(batch, station.lane, then, batch.number, value, self.now())
        self.jobs += 1
        station.lane.stream.launch(work, job, last=True)
        station.lane.stream.ring()

    def act(self, station: Station, action: Callable[[], None], then: Settled | None = None) -> None:
        """Run ``action`` on the station's device stream, behind what was launched there."""
        job = Job(None, station.lane, then or _nothing, -1, None, self.now())
        self.jobs += 1
        station.lane.stream.exclusive(station.back, _with_grad(action), job, last=True)
        station.lane.stream.ring()

    def _completed(self, pending: Pending) -> None:
        waiter = pending.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        job = pending.frame
        if not isinstance(job, Job):
            return
        if pending.event is None or pending.error is not None:
            self._settle(job, pending, pending.error)
            return
        from aiotime.devices.poller import Poller  # an accelerator is in use: its module is loaded already

        Poller.of(self.loop).watch(pending.event, lambda error: self._settle(job, pending, error))

    def _settle(self, job: Job, pending: Pending, error: BaseException | None) -> None:
        value, pending.value = pending.value, None
        self.jobs -= 1
        batch, job.batch = job.batch, None
        try:
            if batch is not None:
                job.lane.running -= 1
                job.then(batch, value, error)
                job.lane.look()
            else:
                job.then(None, value, error)  # type: ignore[arg-type]
        finally:
            if not self.jobs:
                for lane in self.lanes:  # what only waits for better company need not wait any more
                    lane.look()
                for future in self._quiet:
                    if not future.done():
                        future.set_result(None)
                self._quiet.clear()

    async def flush(self) -> None:
        """Wait until every update of instances so far is in the weights; replicas are the same then."""
        await self._no_jobs()
        for averaging in self.averaging.values():
            await averaging.finish()
        await self._no_jobs()

    async def _no_jobs(self) -> None:
        while self.jobs:
            future: asyncio.Future[None] = self.loop.create_future()
            self._quiet.append(future)
            await future

    async def idle(self) -> None:
        """Wait until no instance is in flight."""
        while self.entries:
            await asyncio.wait([entry.task for entry in self.entries if entry.task is not None])

    # ------------------------------------------------------------------ observation

    def visited(self, call: Call) -> None:
        """Note a call whose forward has ended."""
        batch = call.batch
        assert batch is not None
        call.instance.note(
            Visit(
                call.number,
                call.station.name,
                call.asked,
                batch.begun,
                batch.ended,
                batch.number,
                len(batch.calls),
                tuple(sorted(parent.number for parent in call.parents)),
            )
        )

    def turned(self, call: Call) -> None:
        """Note the backward of a call."""
        assert call.batch is not None
        call.instance.note_back(call.number, call.batch.turned[:2])

    def trace_into(self, tracer: Tracer | None) -> None:
        """Write slices of all device streams and of the loop into ``tracer``; None stops."""
        self.tracer = self.completions.tracer = tracer
        for station in self.stations:
            for work in station.works:
                for recorder in work.recorders:
                    recorder.tracer = tracer

    # ------------------------------------------------------------------ time and end

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """After ``seconds`` on the devices' clock."""
        call_at = getattr(self.clock, "call_at", None)
        if call_at is not None:
            call_at(self.now() + seconds, action)
        else:
            self.loop.call_later(seconds, action)

    def _beat(self) -> None:
        now = time.perf_counter()
        for lane in self.lanes:
            lane.stream.pulse(now)
        if self.tracer is not None:
            at = self.now()
            self.tracer.counter("instances in flight", at, len(self.entries))
            for station in self.stations:
                self.tracer.counter(f"calls waiting for {station.name}", at, len(station.inbox))
        self._beating = bool(self.entries)
        if self._beating:
            self.loop.call_later(BEAT, self._beat)

    def end(self, why: AiotimeError) -> None:
        """Accept nothing more; what is in flight ends with ``why``."""
        if self.error is None:
            self.error = why
        for entry in list(self.entries):
            entry.cancelled = True
        for run in list(self.runs):
            run.refused(self.error)

    async def close(self) -> None:
        """End every task and thread. Cancelled: goes on in the background. Idempotent."""
        if self._closing is None:
            self._closing = self.loop.create_task(self._close(), name=f"close:{self.name}")
        await asyncio.shield(self._closing)

    @property
    def closed(self) -> bool:
        """Nothing of it runs any more."""
        return self.loop.is_closed() or (self._closing is not None and self._closing.done())

    def leave(self) -> None:
        """Give the modules back in the mode in which they came."""
        for station in self.stations:
            station.replica.restore()

    async def _close(self) -> None:
        self.end(ClosedError(f"network {self.name!r} was closed"))
        await self.idle()
        await self._no_jobs()
        for averaging in self.averaging.values():
            await averaging.ended()
        for lane in self.lanes:
            lane.stream.close()
        for lane in self.lanes:
            await lane.stream.join()
        self.leave()
        log.info("network.closed", network=self.name, **self.counts)


def _nothing(batch: Batch, value: Any, error: BaseException | None) -> None:
    """Nobody waits for an action."""


def _with_grad(action: Callable[[], None]) -> Callable[[], None]:
    """``action`` outside of the worker's inference mode."""

    def act() -> None:
        with torch.inference_mode(mode=False):
            action()

    return act
