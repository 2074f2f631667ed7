"""Averaging: the replicas of a stage become their mean now and then, without standing still for it.

    each replica, on its own stream:   snapshot θᵣ ──┐
    on the loop:                                     ├──▶ θ̄ = mean θᵣ
    each replica, on its own stream:   θᵣ += θ̄ - snapshot      (updates made in between stay)

Gaunt et al. (AMPNet, 2017), section 5: replicas "periodically averaged".
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.station import Station


class Averaging:
    """Of the replicas of one stage.

    Args:
        floor: where they are open.
        stations: one per replica.
    """

    def __init__(self, floor: Floor, stations: list[Station]) -> None:
        self._floor = floor
        self._stations = stations
        self._every = stations[0].stage.average_every
        self._at = 0  # updates in all when it last happened
        self._round: asyncio.Task[None] | None = None
        self.times = 0

    def _updates(self) -> int:
        found = 0
        for station in self._stations:
            hands = station.hands
            if hands is not None and hands.updater is not None:
                found += hands.updater.updates
        return found

    def look(self) -> None:
        """Begin a round if it is time."""
        if self._round is None and self._updates() - self._at >= self._every:
            self._begin()

    def _begin(self) -> None:
        self._round = self._floor.loop.create_task(self._average(), name=f"average:{self._stations[0].stage.name}")

    async def ended(self) -> None:
        """A round that has begun."""
        if self._round is not None:
            await asyncio.wait([self._round])

    async def finish(self) -> None:
        """The last round; nothing is in flight, so all replicas are the same after it."""
        if self._round is not None:
            await asyncio.shield(self._round)
        if self._updates() != self._at:
            self._begin()
            assert self._round is not None
            await asyncio.shield(self._round)

    async def _average(self) -> None:
        try:
            learners = [station for station in self._stations if station.hands is not None]
            self._at = self._updates()
            snapshots: list[list[torch.Tensor]] = [[] for _ in learners]
            act_on = self._floor.act_on
            await act_on([(each, partial(_snapshot, each, own)) for each, own in zip(learners, snapshots, strict=True)])
            if not all(snapshots):
                return
            with torch.no_grad():
                mean = [torch.stack(same).mean(0) for same in zip(*snapshots, strict=True)]
            await act_on(
                [(each, partial(_blend, each, mean, own)) for each, own in zip(learners, snapshots, strict=True)]
            )
            self.times += 1
        finally:
            self._round = None


def _snapshot(station: Station, into: list[torch.Tensor]) -> None:
    assert station.hands is not None
    into.extend(tensor.cpu() for tensor in station.hands.weights.snapshot())


def _blend(station: Station, mean: list[torch.Tensor], own: list[torch.Tensor]) -> None:
    assert station.hands is not None
    station.hands.blend(mean, own, list(station.kept))
