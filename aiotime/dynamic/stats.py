"""Snapshots of what a network does: NetworkStats, StationStats. Frozen values that print as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiotime.dynamic.hands import Counts
from aiotime.observe.meter import quantile
from aiotime.observe.tables import count, duration, share, text_table

if TYPE_CHECKING:
    from aiotime.dynamic.floor import Floor
    from aiotime.dynamic.station import Station

_COLUMNS = ("stage", "device", "calls", "batches", "mean", "most", "busy", "p50", "p99", "waiting", "peak", "blocked")
_LEARNED = ("stage", "gradients", "updates", "skipped", "delay", "most", "backwards", "mean", "p50", "kept", "unused")


@dataclass(frozen=True, slots=True)
class StationStats:
    """What one stage (of a replicated one: one replica) did since the network was opened.

    Attributes:
        name: the stage; replicas have ``/0``, ``/1``, … behind it.
        device: where it runs.
        calls: forwards of single instances, failed ones included.
        sizes: (calls in a batch, how many batches), in order.
        failed: batches that raised.
        busy: share of the elapsed time that it was computing, forward and backward.
        service_p50: seconds of a forward of a batch, median of the newest 1,024.
        service_p99: the same, 99 of 100 took less.
        waiting: calls that wait now.
        waiting_peak: the most that ever waited in the inbox.
        blocked: calls that had to wait for room in the inbox.
        gradients: that it learned from, one for each use; 0 without learning.
        updates: of its weights.
        skipped: updates left out because a gradient was not finite.
        delays: (updates between a forward and its backward, gradients that met it), in order.
        back_sizes: (gradients in a backward, how many backwards), in order.
        backward_p50: seconds of a backward with its update, median of the newest 1,024.
        kept: batches whose graphs are held for a backward to come.
        unused: instances that used a result of it for nothing.
    """

    name: str
    device: str
    calls: int
    sizes: tuple[tuple[int, int], ...]
    failed: int
    busy: float
    service_p50: float
    service_p99: float
    waiting: int
    waiting_peak: int
    blocked: int
    gradients: int
    updates: int
    skipped: int
    delays: tuple[tuple[int, int], ...]
    back_sizes: tuple[tuple[int, int], ...]
    backward_p50: float
    kept: int
    unused: int

    @property
    def batches(self) -> int:
        """Forwards."""
        return sum(times for _, times in self.sizes)

    @property
    def batch_mean(self) -> float:
        """Calls per batch."""
        return _mean(self.sizes)

    @property
    def delay_mean(self) -> float:
        """Updates that a gradient was late by, on average."""
        return _mean(self.delays)


@dataclass(frozen=True, slots=True)
class NetworkStats:
    """What a network did since it was opened, all runs and requests together.

    Attributes:
        name: the network.
        elapsed: seconds since it was opened.
        instances_in: that came to the door.
        instances_out: handed over.
        instances_shed: given up on purpose (overflow, deadline, cancelled).
        instances_failed: failed.
        active: in flight now.
        latency_p50: seconds from an instance's arrival to its outcome (learning included), median of the newest 1,024.
        latency_p99: the same, 99 of 100 took less.
        averaged: times that replicas became their mean.
        stages: one per stage or replica.
    """

    name: str
    elapsed: float
    instances_in: int
    instances_out: int
    instances_shed: int
    instances_failed: int
    active: int
    latency_p50: float
    latency_p99: float
    averaged: int
    stages: tuple[StationStats, ...]

    def __getitem__(self, stage: str) -> StationStats:
        """Of one stage."""
        for each in self.stages:
            if each.name == stage:
                return each
        raise KeyError(f"no stage {stage!r}; there is {', '.join(each.name for each in self.stages)}")

    def __str__(self) -> str:
        rate = self.instances_out / self.elapsed if self.elapsed else 0.0
        head = (
            f"network {self.name}: {count(self.instances_out)} of {count(self.instances_in)} instances in "
            f"{duration(self.elapsed)} ({count(round(rate, 1))}/s), {count(self.active)} in flight, "
            f"{count(self.instances_failed)} failed, {count(self.instances_shed)} shed, "
            f"latency p50 {duration(self.latency_p50)}, p99 {duration(self.latency_p99)}"
        )
        rows = [
            [
                each.name,
                each.device,
                count(each.calls),
                count(each.batches),
                count(round(each.batch_mean, 2)),
                count(max((size for size, _ in each.sizes), default=0)),
                share(each.busy),
                duration(each.service_p50),
                duration(each.service_p99),
                count(each.waiting),
                count(each.waiting_peak),
                count(each.blocked),
            ]
            for each in self.stages
        ]
        lines = [head, text_table(_COLUMNS, rows)]
        learned = [each for each in self.stages if each.gradients or each.unused]
        if learned:
            lines.append(
                text_table(
                    _LEARNED,
                    [
                        [
                            each.name,
                            count(each.gradients),
                            count(each.updates),
                            count(each.skipped),
                            count(round(each.delay_mean, 2)),
                            count(max((delay for delay, _ in each.delays), default=0)),
                            count(sum(times for _, times in each.back_sizes)),
                            count(round(_mean(each.back_sizes), 2)),
                            duration(each.backward_p50),
                            count(each.kept),
                            count(each.unused),
                        ]
                        for each in learned
                    ],
                )
            )
        if self.averaged:
            lines.append(f"replicas averaged {count(self.averaged)} times")
        return "\n".join(lines)


def snapshot(floor: Floor) -> NetworkStats:
    """Of an open network."""
    elapsed = floor.now() - floor.opened
    latencies = floor.latencies.values()
    return NetworkStats(
        name=floor.name,
        elapsed=elapsed,
        instances_in=floor.counts["in"],
        instances_out=floor.counts["out"],
        instances_shed=floor.counts["shed"],
        instances_failed=floor.counts["failed"],
        active=len(floor.entries),
        latency_p50=quantile(latencies, 0.5),
        latency_p99=quantile(latencies, 0.99),
        averaged=sum(averaging.times for averaging in floor.averaging.values()),
        stages=tuple(_station(floor, station, elapsed) for station in floor.stations),
    )


def _station(floor: Floor, station: Station, elapsed: float) -> StationStats:
    forward = [recorder for work in (station.infer, station.learn) for recorder in work.recorders]
    everything = [recorder for work in station.works for recorder in work.recorders]
    service = [seconds for recorder in forward for seconds in recorder.service.values()]
    learned = Counts.of(station.hands).since(station.before)
    device = station.replica.device
    return StationStats(
        name=station.name,
        device="" if device is None else device.name,
        calls=sum(size * times for size, times in station.sizes.items()),
        sizes=tuple(sorted(station.sizes.items())),
        failed=sum(recorder.failed for recorder in everything),
        busy=min(1.0, sum(recorder.busy for recorder in everything) / elapsed) if elapsed > 0 else 0.0,
        service_p50=quantile(service, 0.5),
        service_p99=quantile(service, 0.99),
        waiting=len(station.inbox),
        waiting_peak=station.inbox.peak,
        blocked=station.inbox.blocked,
        gradients=learned.gradients,
        updates=learned.updates,
        skipped=learned.skipped,
        delays=tuple(learned.delays.items()),
        back_sizes=tuple(sorted(station.back_sizes.items())),
        backward_p50=quantile([s for recorder in station.back.recorders for s in recorder.service.values()], 0.5),
        kept=len(station.kept),
        unused=floor.unused.get(station.stage.name, 0),
    )


def _mean(histogram: tuple[tuple[int, int], ...]) -> float:
    times = sum(number for _, number in histogram)
    return sum(value * number for value, number in histogram) / times if times else 0.0
