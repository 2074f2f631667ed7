"""Snapshots of what a pipeline does: Stats, StageStats, RunStats. Frozen values that print, compare and become JSON.

    Recorder … Recorder ── stage_stats ──▶ StageStats ┐
    counters of the door and of the engine ───────────┴──▶ Stats ── since(earlier) ──▶ Stats of the time between

What limits a stream is told by `Stats.limit` (one word), `Stats.bottleneck` (a stage), `Stats.diagnosis` (a sentence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from aiotime.errors import ConfigurationError
from aiotime.observe.bottleneck import Limit, busiest, diagnose, find_limit
from aiotime.observe.lessons import LESSON_COLUMNS, Lessons
from aiotime.observe.meter import Recorder, Tally, quantile
from aiotime.observe.tables import count, duration, rich_table, share, size, text_table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class StageStats:
    """What one stage did since the pipeline was opened.

    The three shares are of the elapsed time, per worker, between 0 and 1. What is missing to 1 is the
    launching and waking, and a job or a wait that has not ended yet. Near 1: ``busy`` says that this stage
    is the slow one, ``blocked_input`` that it is fed too slowly, ``blocked_output`` that all credits are
    held by frames which have passed it.

    Attributes:
        name: the stage.
        device: where it runs.
        workers: how many frames it may work on at once.
        frames: that it has worked on, failed ones included.
        failed: frames for which it raised or took too long.
        busy: share of the time its workers were computing.
        blocked_input: share of the time they were idle because nothing came.
        blocked_output: share of the time they were idle because all credits were held downstream.
        service_p50: seconds of a job, median of each worker's newest 1,024.
        service_p90: the same, 90 of 100 jobs took less.
        service_p99: the same, 99 of 100 jobs took less.
        queue: frames that wait before the stage now.
        queue_mean: how many a frame found waiting there on its arrival, on average.
        queue_max: the most that ever waited there.
        batch_mean: frames that ran as one job, on average; the service times are of jobs. 1.0 without ``max_batch``.
        learning: what it learned; None where it does not. Backwards and updates are part of ``busy``, and those that
            raised of ``failed``; the quantiles are of forwards.
    """

    name: str
    device: str
    workers: int
    frames: int
    failed: int
    busy: float
    blocked_input: float
    blocked_output: float
    service_p50: float
    service_p90: float
    service_p99: float
    queue: int
    queue_mean: float
    queue_max: int
    learning: Lessons | None = None
    batch_mean: float = 1.0


def stage_stats(
    name: str,
    device: str,
    recorders: Sequence[Recorder],
    *,
    elapsed: float,
    queue: int,
    queue_mean: float,
    queue_max: int,
    backward: Sequence[Recorder] = (),
    learning: Lessons | None = None,
    tally: Tally | None = None,
) -> StageStats:
    """Add up the recorders of one stage, one per worker, over ``elapsed`` seconds since the pipeline was opened.

    ``backward``: those of its backward and weight jobs, which the same workers do. ``tally``: of frames that shared
    jobs.
    """
    jobs = sum(recorder.jobs for recorder in recorders)
    joined, failed = (0, 0) if tally is None else (tally.joined, tally.failed)
    everything = [*recorders, *backward]
    spent = elapsed * len(recorders)
    service = sorted(seconds for recorder in recorders for seconds in recorder.service.values())
    return StageStats(
        name=name,
        device=device,
        workers=len(recorders),
        frames=jobs + joined,
        failed=sum(recorder.failed for recorder in everything) + failed,
        busy=_share(sum(recorder.busy for recorder in everything), spent),
        blocked_input=_share(sum(recorder.idle_input for recorder in recorders), spent),
        blocked_output=_share(sum(recorder.idle_output for recorder in recorders), spent),
        service_p50=quantile(service, 0.5),
        service_p90=quantile(service, 0.9),
        service_p99=quantile(service, 0.99),
        queue=queue,
        queue_mean=queue_mean,
        queue_max=queue_max,
        learning=learning,
        batch_mean=(jobs + joined) / jobs if jobs else 1.0,
    )


@dataclass(frozen=True, slots=True)
class Stats:
    """What a pipeline did since it was opened, all runs and requests together.

    Attributes:
        name: the pipeline.
        elapsed: seconds since it was opened.
        frames_in: frames that came to the door.
        frames_out: predictions handed over.
        frames_shed: frames given up on purpose (overflow, deadline, cancelled).
        frames_failed: frames refused at the door or failed in a stage.
        in_flight: frames between the door and their outcome now.
        waiting: runs and requests that wait at the door for a credit now.
        budget_frames: how many frames may be in flight; None: no limit.
        budget_bytes: how many bytes of payload may be in flight; None: no limit.
        bytes_in_flight: bytes of payload in flight now; counted only where there is a limit.
        latency_p50: seconds from a frame's arrival to its result, median of the newest 1,024.
        latency_p99: the same, 99 of 100 frames took less.
        stages: in the order of the stream.
        undelivered_mean: finished frames that waited for their consumer, on average over the elapsed time.
        frames_before: frames that were inside when the counting began: none at the opening, some for `since`.
        learning_failed: frames that were predicted and could not be learned from.
    """

    name: str
    elapsed: float
    frames_in: int
    frames_out: int
    frames_shed: int
    frames_failed: int
    in_flight: int
    waiting: int
    budget_frames: int | None
    budget_bytes: int | None
    bytes_in_flight: int
    latency_p50: float
    latency_p99: float
    stages: tuple[StageStats, ...]
    undelivered_mean: float = 0.0
    frames_before: int = 0
    learning_failed: int = 0

    @property
    def frames_per_second(self) -> float:
        """Predictions handed over per second; 0.0 when no time has passed."""
        return self.frames_out / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def undelivered(self) -> int:
        """Frames that came in, are not in flight and have not left: most are finished and wait for the consumer."""
        return max(0, self._inside - self.in_flight)

    @property
    def _inside(self) -> int:
        return self.frames_before + self.frames_in - self.frames_out - self.frames_shed - self.frames_failed

    @property
    def limit(self) -> Limit | None:
        """What limits the stream: "stage", "source", "consumer" or "budget"; None while nothing has run.

        The rule is in `aiotime.observe.bottleneck`. The shares it rests on are those of the whole time since
        opening; look at ``stats.since(earlier)`` for what holds now.
        """
        return find_limit(self)

    @property
    def bottleneck(self) -> str | None:
        """The stage that limits the stream (the busiest per worker); None where something else does. See `limit`."""
        stage = busiest(self.stages)
        return stage.name if stage is not None and self.limit == "stage" else None

    @property
    def diagnosis(self) -> str:
        """What limits the stream, as a sentence with the numbers behind it."""
        return diagnose(self)

    def since(self, earlier: Stats) -> Stats:
        """What happened between ``earlier`` and this snapshot, as a dashboard shows it.

        Counters, elapsed time and the shares are those of the time between. What has no difference is
        taken from this snapshot: quantiles (they are of the newest frames anyway), queues, what is in flight.

        Raises:
            ConfigurationError: ``earlier`` is later, or of another pipeline or another opening of this one.
        """
        before = {stage.name: stage for stage in earlier.stages}
        span = self.elapsed - earlier.elapsed
        if (
            earlier.name != self.name
            or span < 0
            or earlier.frames_in > self.frames_in
            or any(stage.name in before and before[stage.name].frames > stage.frames for stage in self.stages)
        ):
            raise ConfigurationError(
                f"since() compares two snapshots of one opened pipeline, the earlier as argument; this one is of "
                f"{self.name!r} after {self.elapsed:g} s, the argument of {earlier.name!r} after "
                f"{earlier.elapsed:g} s. A pipeline that was opened again starts anew: forget the old snapshot"
            )
        return replace(
            self,
            elapsed=span,
            frames_in=self.frames_in - earlier.frames_in,
            frames_out=self.frames_out - earlier.frames_out,
            frames_shed=self.frames_shed - earlier.frames_shed,
            frames_failed=self.frames_failed - earlier.frames_failed,
            undelivered_mean=_mean_since(
                self.undelivered_mean, earlier.undelivered_mean, self.elapsed, earlier.elapsed
            ),
            frames_before=earlier._inside,
            learning_failed=self.learning_failed - earlier.learning_failed,
            stages=tuple(
                _stage_since(stage, before.get(stage.name), self.elapsed, earlier.elapsed) for stage in self.stages
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it (for a ``/stats`` endpoint), with frames_per_second, bottleneck and diagnosis."""
        stages = [asdict(stage) for stage in self.stages]
        return asdict(self) | {
            "stages": stages,
            "frames_per_second": self.frames_per_second,
            "limit": self.limit,
            "bottleneck": self.bottleneck,
            "diagnosis": self.diagnosis,
        }

    def __str__(self) -> str:
        tables = [text_table(self._columns(), self._rows(), left=2)]
        if lessons := self._lessons():
            tables += ["", text_table(LESSON_COLUMNS, lessons)]
        return "\n".join([*self._heading(), "", *tables, "", self.diagnosis])

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        heading = Text("\n".join(self._heading()) + "\n")
        tables: list[Table | Text] = [rich_table(self._columns(), self._rows(), left=2)]
        if lessons := self._lessons():
            tables += [Text(""), rich_table(LESSON_COLUMNS, lessons)]
        return Group(heading, *tables, Text("\n" + self.diagnosis, "bold"))

    def _heading(self) -> list[str]:
        flight = count(self.in_flight) if self.budget_frames is None else f"{self.in_flight} of {self.budget_frames}"
        if self.budget_bytes is not None:
            flight += f" ({size(self.bytes_in_flight)} of {size(self.budget_bytes)})"
        first = (
            f"pipeline {self.name!r}: {count(self.frames_out)} frames in {duration(self.elapsed)}, "
            f"{count(round(self.frames_per_second, 1))} frames/s"
        )
        second = (
            f"in {count(self.frames_in)}, shed {count(self.frames_shed)}, failed {count(self.frames_failed)}; "
            f"in flight {flight}, waiting {count(self.waiting)}"
        )
        third = f"latency p50 {duration(self.latency_p50)}, p99 {duration(self.latency_p99)}"
        if self.learning_failed:
            third += f"; {count(self.learning_failed)} frames could not be learned from"
        return [first, second, third]

    def _lessons(self) -> list[list[str]]:
        return [stage.learning.row(stage.name) for stage in self.stages if stage.learning is not None]

    @property
    def _batches(self) -> bool:
        return any(stage.batch_mean > 1 for stage in self.stages)

    def _columns(self) -> tuple[str, ...]:
        return (*STAGE_COLUMNS, "batch") if self._batches else STAGE_COLUMNS

    def _rows(self) -> list[list[str]]:
        batches = self._batches
        return [
            [
                stage.name,
                stage.device if stage.workers == 1 else f"{stage.device} ×{stage.workers}",
                count(stage.frames),
                count(stage.failed),
                share(stage.busy),
                share(stage.blocked_input),
                share(stage.blocked_output),
                duration(stage.service_p50),
                duration(stage.service_p99),
                count(stage.queue),
                *([count(round(stage.batch_mean, 1))] if batches else []),
            ]
            for stage in self.stages
        ]


# what fits into 80 columns; the rest (p90, mean and greatest queue) is in to_dict()
STAGE_COLUMNS = ("stage", "device", "frames", "failed", "busy", "no input", "no room", "p50", "p99", "queue")


@dataclass(frozen=True, slots=True)
class RunStats:
    """What one run did since it began.

    Attributes:
        name: the run.
        elapsed: seconds since it began.
        frames_in: frames its source yielded.
        frames_out: predictions its consumer took.
        frames_shed: frames given up on purpose (overflow, deadline, cancelled).
        frames_failed: frames refused at the door or failed in a stage.
        window: frames it holds now, in flight or waiting for the consumer.
        latency_p50: seconds from a frame's arrival to its result, median of the newest 1,024.
        latency_p99: the same, 99 of 100 frames took less.
    """

    name: str
    elapsed: float
    frames_in: int
    frames_out: int
    frames_shed: int
    frames_failed: int
    window: int
    latency_p50: float
    latency_p99: float

    @property
    def frames_per_second(self) -> float:
        """Predictions taken per second; 0.0 when no time has passed."""
        return self.frames_out / self.elapsed if self.elapsed > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it, with frames_per_second."""
        return asdict(self) | {"frames_per_second": self.frames_per_second}

    def __str__(self) -> str:
        return text_table(RUN_COLUMNS, [self._row()])

    def __rich__(self) -> Table:
        return rich_table(RUN_COLUMNS, [self._row()])

    def _row(self) -> list[str]:
        return [
            self.name,
            duration(self.elapsed),
            count(self.frames_in),
            count(self.frames_out),
            count(self.frames_shed),
            count(self.frames_failed),
            count(self.window),
            count(round(self.frames_per_second, 1)),
            duration(self.latency_p50),
            duration(self.latency_p99),
        ]


RUN_COLUMNS = ("run", "elapsed", "in", "out", "shed", "failed", "held", "frames/s", "p50", "p99")


def _stage_since(now: StageStats, before: StageStats | None, elapsed: float, earlier: float) -> StageStats:
    if before is None:
        return now

    def between(newer: float, older: float) -> float:
        return min(1.0, _mean_since(newer, older, elapsed, earlier))

    return replace(
        now,
        frames=now.frames - before.frames,
        failed=now.failed - before.failed,
        busy=between(now.busy, before.busy),
        blocked_input=between(now.blocked_input, before.blocked_input),
        blocked_output=between(now.blocked_output, before.blocked_output),
        batch_mean=_batch_since(now, before),
        learning=None
        if now.learning is None or before.learning is None
        else now.learning.since(before.learning, elapsed, earlier),
    )


def _batch_since(now: StageStats, before: StageStats) -> float:
    """Frames per job of the time between."""
    jobs = now.frames / now.batch_mean - before.frames / before.batch_mean
    return (now.frames - before.frames) / jobs if jobs > 0.5 else 1.0


def _mean_since(newer: float, older: float, elapsed: float, earlier: float) -> float:
    """The mean over the time between, from two means since the opening."""
    return max(0.0, (newer * elapsed - older * earlier) / (elapsed - earlier)) if elapsed > earlier else 0.0


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
