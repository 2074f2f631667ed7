"""House: the life of a network: which stages it has, the open floor, who uses it, and the weights when nobody does."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aiotime.devices.base import Clock, RealClock
from aiotime.devices.cpu import CpuDevice
from aiotime.dynamic.floor import Floor
from aiotime.dynamic.session import Session
from aiotime.dynamic.stage import Stage
from aiotime.dynamic.stats import NetworkStats, snapshot
from aiotime.dynamic.step import Step
from aiotime.errors import ClosedError, ConfigurationError, FrameError, InputError
from aiotime.frame import Sample
from aiotime.observe.meter import Tracer
from aiotime.requests import Request
from aiotime.runs import check_deadline
from aiotime.stage import OnError

if TYPE_CHECKING:
    from aiotime.dynamic.lesson import Lesson
    from aiotime.dynamic.network import Network

REQUESTS = 1024  # submitted instances in flight


class House:
    """What runs one network.

    Args:
        network: the user's.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.name = getattr(network, "name", "") or type(network).__name__
        self.runs = 0  # numbers given so far
        self._stages: list[tuple[str, Stage]] | None = None
        self._guests: list[Any] = []  # pipelines among the attributes
        self._clock: Clock = RealClock()
        self._floor: Floor | None = None
        self._closing: Floor | None = None
        self._leases = 0
        self._entered = False
        self._exits = AsyncExitStack()
        self._requests: Session | None = None
        self._last: NetworkStats | None = None
        self._tracer: Tracer | None = None

    # ------------------------------------------------------------------ what it is made of

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """(name, stage) of the network and its parts, found at first use."""
        if self._stages is None:
            self._check_forward()
            found: dict[Stage, str] = {}
            for path, thing in _contents(self._network):
                if isinstance(thing, Stage):
                    found.setdefault(thing, path)
                else:
                    self._guests.append(thing)
            if not found:
                raise ConfigurationError(
                    f"network {self.name!r} has no stages: make them in __init__, "
                    "self.cell = aiotime.dynamic.Stage(module, device=...)"
                )
            self._stages = [(stage.name if stage.named else path, stage) for stage, path in found.items()]
            names = [name for name, _ in self._stages]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ConfigurationError(f"two stages of network {self.name!r} are called {twice!r}")
            for name, stage in self._stages:
                stage.name = name
            self._find_devices()
        return self._stages

    def _check_forward(self) -> None:
        network = type(self._network)
        if not inspect.iscoroutinefunction(network.forward):
            raise ConfigurationError(
                f"{network.__name__}.forward must be 'async def forward(self, sample)' and return its result (no yield)"
            )
        for name, value in vars(self._network).items():
            bare = isinstance(value, nn.Parameter) or (
                isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters())
            )
            if bare:
                warnings.warn(
                    f"{network.__name__}.{name} is a {type(value).__name__} outside of the stages: it is not learned, "
                    f"and state_dict() does not have it. Write self.{name} = aiotime.dynamic.Stage(...), or freeze it",
                    stacklevel=2,
                )

    def _find_devices(self) -> None:
        assert self._stages is not None
        replicas = [replica for _, stage in self._stages for replica in stage.replicas]
        taken = {replica.device.name for replica in replicas if replica.device is not None}
        free = (device for device in map(CpuDevice, range(len(replicas) + len(taken))) if device.name not in taken)
        for replica in replicas:
            if replica.device is None:
                replica.device = next(free)
        clocks = {id(r.device.clock): r.device.clock for r in replicas if r.device is not None}
        real = [clock for clock in clocks.values() if isinstance(clock, RealClock)]
        virtual = [clock for clock in clocks.values() if not isinstance(clock, RealClock)]
        if len(virtual) > 1 or (virtual and real):
            raise ConfigurationError(
                f"the devices of network {self.name!r} live on different clocks; simulated devices share one "
                "VirtualClock and cannot be mixed with real ones"
            )
        self._clock = virtual[0] if virtual else RealClock()

    # ------------------------------------------------------------------ open and closed

    def open(self) -> Floor:
        """The floor on the running loop."""
        loop = asyncio.get_running_loop()
        floor = self._floor
        if floor is not None and floor.loop is loop:
            return floor
        if floor is not None and not floor.loop.is_closed():
            raise ConfigurationError(f"network {self.name!r} is open on another event loop; close it there first")
        if floor is not None:
            self._leases = 0  # its loop is gone
            floor.leave()
            _vacate(self.stages)
        stages = self.stages
        _occupy(stages, self)
        try:
            self._floor = floor = Floor(self._network, stages, name=self.name, clock=self._clock)
        except BaseException:
            _vacate(stages)
            raise
        if self._closing is not None and not self._closing.closed:
            floor.predecessor = self._closing
        floor.trace_into(self._tracer)
        self._requests = None
        return floor

    async def enter(self) -> None:
        """Open until `close`."""
        if self._entered:
            raise ConfigurationError(f"network {self.name!r} is open already")
        if self._closing is not None and not self._closing.closed:
            await self._closing.close()
        floor = self.open()
        try:
            for guest in self._guests:
                await self._exits.enter_async_context(guest)
        except BaseException:
            await self.close()
            raise
        self._entered = floor is self._floor

    async def close(self) -> None:
        """End every task and thread. Idempotent."""
        self._entered = False
        floor, self._floor = self._floor, None
        if floor is not None:
            self._last, self._closing = snapshot(floor), floor
        floor = self._closing
        exits, self._exits = self._exits, AsyncExitStack()
        try:
            if floor is not None and not floor.loop.is_closed():
                await floor.close()  # cancelled: it goes on in the background
        finally:
            await exits.aclose()
            if self._closing is floor and floor is not None and floor.closed:
                self._closing = None
                if self._floor is None:
                    _vacate(self.stages)

    @property
    def closed(self) -> bool:
        """No stage is in use."""
        return self._floor is None and (self._closing is None or self._closing.closed)

    async def drain(self) -> None:
        """Finish what was accepted, accept nothing new."""
        floor = self._floor
        if floor is None:
            return
        floor.draining = True
        for run in list(floor.runs):
            run.stop()
        if self._requests is not None:
            while self._requests.door.waiting:
                await asyncio.sleep(0)
                await floor.idle()
        await floor.idle()
        await floor.flush()

    def lease(self, *, keys: int, lesson: Lesson | None, paths: bool) -> Session:
        """For one run; to be given back."""
        if self._guests_closed():
            raise ClosedError(
                f"network {self.name!r} holds a pipeline; open both with 'async with network:' before it runs"
            )
        floor = self.open()
        if floor.error is not None:
            raise floor.error
        if floor.draining:
            raise ClosedError(f"network {self.name!r} is draining and takes no new runs")
        try:
            session = Session(floor, keys=keys, lesson=lesson, recorded=paths)
        except BaseException:
            if not self._leases and not self._entered:
                self._abandon()
            raise
        self._leases += 1
        return session

    def _guests_closed(self) -> bool:
        return bool(self.stages) and bool(self._guests) and not self._entered

    def _abandon(self) -> None:
        """Close in the background what was opened for a run that could not begin."""
        floor, self._floor = self._floor, None
        if floor is not None:
            self._closing = floor
            floor.loop.create_task(self.close(), name=f"close:{self.name}")

    async def give_back(self) -> None:
        """A run ends; the last one closes a network that nobody opened by hand."""
        self._leases -= 1
        if self._leases == 0 and not self._entered:
            await self.close()

    # ------------------------------------------------------------------ requests

    async def submit(self, sample: Any, deadline: float | None) -> Step:
        """One instance, and its prediction."""
        floor = self._floor
        if floor is None:
            raise ClosedError(f"network {self.name!r} is not open; use 'async with network:' around submit()")
        if floor.loop is not asyncio.get_running_loop():
            raise ConfigurationError(f"network {self.name!r} is open on another event loop")
        if floor.error is not None:
            raise floor.error
        if floor.draining:
            raise ClosedError(f"network {self.name!r} is draining and takes no new requests")
        if self._requests is None or self._requests.floor is not floor:
            self._requests = Session(floor, keys=REQUESTS, lesson=None, recorded=False)
        request = Request(self._requests, sample, None)
        if deadline is None and type(sample) is Sample:
            deadline = sample.deadline
        check_deadline(deadline)
        prediction = await request.answer(deadline, real_time=isinstance(self._clock, RealClock))
        assert isinstance(prediction, Step)
        return prediction

    # ------------------------------------------------------------------ weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies, under ``"stage.key"``; replicas as their mean."""
        found: dict[str, torch.Tensor] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, stage in self.stages:
                states = [r.fn.state_dict() for r in stage.replicas if isinstance(r.fn, nn.Module)]
                for key in states[0] if states else ():
                    same = [state[key] for state in states]
                    if len(same) == 1 or not same[0].is_floating_point():
                        found[f"{name}.{key}"] = same[0].detach().clone()
                    else:
                        found[f"{name}.{key}"] = torch.stack([t.detach().to(same[0].device) for t in same]).mean(0)
        return found

    async def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Into every replica, between two batches."""
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ConfigurationError(f"load_state_dict: missing keys {missing}, unexpected keys {unexpected}")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise ConfigurationError(
                    f"load_state_dict: {key!r} has shape {tuple(value.shape)}, the network's is {tuple(own[key].shape)}"
                )
        with torch.inference_mode(mode=False):
            copies = {key: value.detach().clone() for key, value in state.items()}
        floor = self._floor
        if floor is None or floor.error is not None:
            for name, stage in self.stages:
                for replica in stage.replicas:
                    _load(replica, name, copies)
            return
        await floor.act_on(
            [(station, partial(_load, station.replica, station.stage.name, copies)) for station in floor.stations]
        )

    # ------------------------------------------------------------------ observation

    def stats(self) -> NetworkStats:
        """Of now, or of the end."""
        if self._floor is not None:
            return snapshot(self._floor)
        if self._last is None:
            raise ClosedError(f"network {self.name!r} was never open; it has statistics from opening on")
        return self._last

    def trace_into(self, tracer: Tracer | None) -> None:
        """None stops."""
        self._tracer = tracer
        if self._floor is not None:
            self._floor.trace_into(tracer)


class Tenant:
    """A network, as one of its runs sees it (`aiotime.runs.Host`)."""

    on_error: Mapping[str, OnError] = {}
    keeps_input = False

    def __init__(self, house: House, *, keys: int, lesson: Lesson | None, paths: bool) -> None:
        self._house = house
        self._keys = keys
        self._lesson = lesson
        self._paths = paths
        self._session: Session | None = None

    def lease(self) -> Session:
        """Opens the network if need be."""
        self._session = self._house.lease(keys=self._keys, lesson=self._lesson, paths=self._paths)
        return self._session

    async def give_back(self) -> None:
        """The run is over."""
        if self._session is not None:
            self._session.floor.lesson_over(self._lesson)
        await self._house.give_back()

    def inspect(self, payload: Any, index: int | None, key: Any) -> Any:
        """Taken as it is: only the network's forward knows what it takes."""
        if isinstance(payload, FrameError):  # the source could not read this one
            payload.frame, payload.key = index, key
            raise payload if isinstance(payload, InputError) else InputError(str(payload), frame=index, key=key)
        return payload


def _contents(root: Any) -> Iterator[tuple[str, Any]]:
    """(path, stage or pipeline) among the attributes of a network and its parts."""
    from aiotime.dynamic.network import Network

    seen: set[int] = set()

    def walk(prefix: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(thing, Stage):
            yield prefix, thing
        elif isinstance(thing, Network | list | tuple | dict):
            if id(thing) in seen:
                return
            seen.add(id(thing))
            inside: Any = vars(thing).items() if isinstance(thing, Network) else thing
            if isinstance(thing, dict):
                inside = thing.items()
            elif isinstance(thing, list | tuple):
                inside = enumerate(thing)
            for name, each in inside:
                if not str(name).startswith("_aiotime_"):
                    yield from walk(f"{prefix}.{name}" if prefix else str(name), each)
        elif callable(getattr(thing, "submit", None)) and hasattr(thing, "__aenter__"):
            yield prefix, thing

    yield from walk("", root)


def _occupy(stages: list[tuple[str, Stage]], house: House) -> None:
    for name, stage in stages:
        if stage.occupied is not None and stage.occupied is not house and not stage.occupied.closed:
            raise ConfigurationError(
                f"stage {name!r} is open in another network; a stage is in one open network at a time"
            )
    for _, stage in stages:
        stage.occupied = house


def _vacate(stages: list[tuple[str, Stage]]) -> None:
    for _, stage in stages:
        stage.occupied = None


def _load(replica: Any, name: str, state: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(replica.fn, nn.Module):
        return
    prefix = f"{name}."
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    with torch.inference_mode(mode=False), torch.no_grad():
        own = {key: value.to(replica.fn.state_dict()[key].device, copy=True) for key, value in own.items()}
        replica.fn.load_state_dict(own, assign=True)
        if replica.hands is not None:
            replica.hands.weights.adopt()
            replica.hands.corrected.reset()
