"""Snapshots: adding up recorders, what limits a stream, differences, JSON and tables."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aiotime.errors import ConfigurationError
from aiotime.observe.meter import WINDOW, Recorder
from aiotime.observe.stats import RunStats, StageStats, Stats, stage_stats

# ------------------------------------------------------------------ making data


def stage(name: str = "decode", device: str = "cpu:0", **changes: Any) -> StageStats:
    """A stage that did nothing remarkable, but for ``changes``."""
    values: dict[str, Any] = {
        "workers": 1,
        "frames": 100,
        "failed": 0,
        "busy": 0.0,
        "blocked_input": 0.0,
        "blocked_output": 0.0,
        "service_p50": 0.01,
        "service_p90": 0.02,
        "service_p99": 0.03,
        "queue": 0,
        "queue_mean": 0.0,
        "queue_max": 0,
    }
    return StageStats(name=name, device=device, **values | changes)


def stats(*stages: StageStats, **changes: Any) -> Stats:
    """A pipeline after ten seconds, but for ``changes``."""
    values: dict[str, Any] = {
        "name": "p",
        "elapsed": 10.0,
        "frames_in": 100,
        "frames_out": 90,
        "frames_shed": 2,
        "frames_failed": 1,
        "in_flight": 7,
        "waiting": 1,
        "budget_frames": 8,
        "budget_bytes": None,
        "bytes_in_flight": 0,
        "latency_p50": 0.05,
        "latency_p99": 0.08,
    }
    return Stats(stages=stages, **values | changes)


def run_stats(**changes: Any) -> RunStats:
    """A run after four seconds, but for ``changes``."""
    values: dict[str, Any] = {
        "name": "run 0",
        "elapsed": 4.0,
        "frames_in": 10,
        "frames_out": 8,
        "frames_shed": 1,
        "frames_failed": 0,
        "window": 1,
        "latency_p50": 0.05,
        "latency_p99": 0.08,
    }
    return RunStats(**values | changes)


def recorder(durations: list[float], *, failed: int = 0, idle_input: float = 0.0, idle_output: float = 0.0) -> Recorder:
    """A worker that did jobs of these durations, in seconds."""
    made = Recorder("decode", "cpu:0")
    now = 0.0
    for frame, seconds in enumerate(durations):
        made.add(now, now + seconds, frame)
        now += seconds
    made.failed, made.idle_input, made.idle_output = failed, idle_input, idle_output
    return made


# ------------------------------------------------------------------ adding up


def test_stage_stats_of_one_worker() -> None:
    """Shares are of the elapsed time, quantiles of the jobs."""
    measured = stage_stats(
        "decode",
        "cpu:0",
        [recorder([0.25, 0.5, 1.25], failed=1, idle_input=1.0, idle_output=0.5)],
        elapsed=4.0,
        queue=3,
        queue_mean=1.5,
        queue_max=5,
    )
    assert (measured.name, measured.device, measured.workers) == ("decode", "cpu:0", 1)
    assert (measured.frames, measured.failed) == (3, 1)
    assert measured.busy == pytest.approx(0.5)
    assert measured.blocked_input == pytest.approx(0.25)
    assert measured.blocked_output == pytest.approx(0.125)
    assert measured.service_p50 == pytest.approx(0.5)
    assert measured.service_p99 == pytest.approx(1.25)
    assert (measured.queue, measured.queue_mean, measured.queue_max) == (3, 1.5, 5)


def test_stage_stats_of_several_workers() -> None:
    """Shares are per worker, so that two workers, one of them busy, are half busy."""
    measured = stage_stats(
        "decode",
        "cpu:0",
        [recorder([2.0]), recorder([], idle_input=2.0)],
        elapsed=2.0,
        queue=0,
        queue_mean=0.0,
        queue_max=0,
    )
    assert measured.workers == 2
    assert measured.busy == pytest.approx(0.5)
    assert measured.blocked_input == pytest.approx(0.5)


def test_stage_stats_of_nothing() -> None:
    """No time, no worker, no job: zeros, not an error."""
    for recorders in ([], [Recorder("decode", "cpu:0")]):
        measured = stage_stats("decode", "cpu:0", recorders, elapsed=0.0, queue=0, queue_mean=0.0, queue_max=0)
        assert (measured.busy, measured.blocked_input, measured.service_p99) == (0.0, 0.0, 0.0)


@given(
    st.lists(st.lists(st.floats(0, 10), max_size=2 * WINDOW), min_size=1, max_size=3),
    st.floats(0, 100),
)
def test_stage_stats_stay_in_range(durations: list[list[float]], elapsed: float) -> None:
    """Whatever the clocks say, shares lie between 0 and 1 and quantiles are in order and among the newest jobs."""
    recorders = [recorder(of_one, idle_input=1.0) for of_one in durations]
    measured = stage_stats("s", "cpu:0", recorders, elapsed=elapsed, queue=0, queue_mean=0.0, queue_max=0)
    assert measured.frames == sum(map(len, durations))
    for part in (measured.busy, measured.blocked_input, measured.blocked_output):
        assert 0.0 <= part <= 1.0
    newest = [seconds for of_one in durations for seconds in of_one[-WINDOW:]]
    assert measured.service_p50 <= measured.service_p90 <= measured.service_p99 <= max(newest, default=0.0) + 1e-9


# ------------------------------------------------------------------ differences


def test_since() -> None:
    """Counters and shares of the time between two snapshots; what has no difference is the later's."""
    earlier = stats(
        stage(busy=0.2, blocked_input=0.8, frames=10), elapsed=10.0, frames_in=20, frames_out=10, undelivered_mean=4.0
    )
    later = stats(
        stage(busy=0.5, blocked_input=0.5, frames=40, queue=3, service_p50=0.5),
        elapsed=20.0,
        frames_in=60,
        frames_out=50,
        frames_shed=5,
        frames_failed=4,
        in_flight=1,
        undelivered_mean=3.0,
    )
    between = later.since(earlier)
    assert between.elapsed == 10.0
    assert (between.frames_in, between.frames_out, between.frames_shed, between.frames_failed) == (40, 40, 3, 3)
    assert between.frames_per_second == 4.0
    assert between.in_flight == 1
    assert between.undelivered_mean == pytest.approx(2.0)
    assert between.frames_before == 7
    (one,) = between.stages
    assert one.frames == 30
    assert one.busy == pytest.approx(0.8)
    assert one.blocked_input == pytest.approx(0.2)
    assert (one.queue, one.service_p50) == (3, 0.5)


def test_since_keeps_what_waits_for_the_consumer() -> None:
    """Frames that came before the time between are there nevertheless: five wait in both views."""
    earlier = stats(stage(), elapsed=5.0, frames_in=50, frames_out=40, frames_shed=0, frames_failed=0, in_flight=6)
    later = stats(stage(), elapsed=10.0, frames_in=60, frames_out=52, frames_shed=1, frames_failed=0, in_flight=2)
    assert later.undelivered == 5
    assert later.since(earlier).undelivered == 5
    assert later.since(earlier).limit == "consumer"
    assert later.since(earlier).since(later.since(earlier)).undelivered == 5


def test_since_itself() -> None:
    """No time between: zeros, no division by it."""
    snapshot = stats(stage(busy=0.5))
    between = snapshot.since(snapshot)
    assert (between.elapsed, between.frames_out, between.frames_per_second) == (0.0, 0, 0.0)
    assert between.stages[0].busy == 0.0


@pytest.mark.parametrize(
    "earlier",
    [
        stats(stage(), name="other"),
        stats(stage(), elapsed=11.0),
        stats(stage(), frames_in=101),
        stats(stage(frames=101)),
    ],
    ids=["other pipeline", "later", "more frames", "more jobs"],
)
def test_since_refuses_what_is_not_earlier(earlier: Stats) -> None:
    """Swapped arguments, or a pipeline opened again, would give nonsense."""
    with pytest.raises(ConfigurationError, match="two snapshots of one opened pipeline"):
        stats(stage()).since(earlier)


SPANS = st.lists(
    st.tuples(st.floats(0.01, 10), st.floats(0, 1), st.integers(0, 1000), st.integers(0, 1000)), min_size=3, max_size=3
)


@given(SPANS)
def test_since_gives_back_what_happened(spans: list[tuple[float, float, int, int]]) -> None:
    """Snapshots built up from spans of time: the difference of two is the span between, and differences add up."""
    snapshots = [stats(stage(frames=0), elapsed=0.0, frames_in=0, frames_out=0, frames_shed=0, frames_failed=0)]
    elapsed = busy = 0.0
    came = left = 0
    for seconds, part, frames_in, frames_out in spans:
        elapsed, busy, came, left = elapsed + seconds, busy + seconds * part, came + frames_in, left + frames_out
        now = stage(busy=busy / elapsed, frames=left)
        snapshots.append(stats(now, elapsed=elapsed, frames_in=came, frames_out=left, frames_shed=0, frames_failed=0))
    for index, (seconds, part, frames_in, frames_out) in enumerate(spans):
        between = snapshots[index + 1].since(snapshots[index])
        assert between.elapsed == pytest.approx(seconds)
        assert between.stages[0].busy == pytest.approx(part, abs=1e-6)
        assert (between.frames_in, between.frames_out, between.stages[0].frames) == (frames_in, frames_out, frames_out)
    whole = snapshots[3].since(snapshots[0])
    assert whole.frames_in == sum(snapshots[index + 1].since(snapshots[index]).frames_in for index in range(3))


# ------------------------------------------------------------------ forms


def test_snapshots_are_frozen_and_slotted() -> None:
    """A snapshot does not change, and takes no attributes that do not exist."""
    for snapshot, field in ((stats(), "elapsed"), (stage(), "busy"), (run_stats(), "elapsed")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(snapshot, field, 1.0)
        assert not hasattr(snapshot, "__dict__")


def test_to_dict_is_json() -> None:
    """What an endpoint sends: all fields, the stages, and what follows from them."""
    snapshot = stats(stage("decode", busy=0.9))
    sent = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
    assert {field.name for field in dataclasses.fields(Stats)} < sent.keys()
    assert sent["stages"][0]["name"] == "decode"
    assert (sent["frames_per_second"], sent["limit"], sent["bottleneck"]) == (9.0, "stage", "decode")
    assert sent["diagnosis"] == snapshot.diagnosis
    assert sent["budget_bytes"] is None


def test_str_is_an_aligned_table() -> None:
    """One line per stage under a header, the counters above, the diagnosis below."""
    snapshot = stats(
        stage("decode", busy=0.98, frames=1204),
        stage("m", "cuda:0", workers=2),
        budget_bytes=1 << 20,
        bytes_in_flight=2048,
    )
    lines = str(snapshot).splitlines()
    assert lines[0] == "pipeline 'p': 90 frames in 10.0 s, 9 frames/s"
    assert "in 100, shed 2, failed 1; in flight 7 of 8 (2.00 KiB of 1.00 MiB), waiting 1" in lines[1]
    header, first, second = lines[4:7]
    assert header.split()[:4] == ["stage", "device", "frames", "failed"]
    assert header.index("device") == first.index("cpu:0") == second.index("cuda:0 ×2")
    assert first[: header.index("frames") + len("frames")].endswith(" 1,204")
    assert lines[-1] == snapshot.diagnosis
    assert max(map(len, lines[:3])) <= 80


def test_str_without_a_budget() -> None:
    """No limit, no "of"."""
    assert "in flight 7, waiting" in str(stats(budget_frames=None))


def test_rich_shows_the_same() -> None:
    """``rich.print(pipeline.stats())`` is a table with the same cells."""
    file = io.StringIO()
    console = Console(file=file, width=80)
    console.print(stats(stage("decode", busy=0.98)))
    console.print(run_stats())
    shown = file.getvalue()
    for cell in ("decode", "98 %", "pipeline 'p'", "stage 'decode' limits", "run 0", "4.00 s"):
        assert cell in shown


def test_run_stats() -> None:
    """A run has the same forms."""
    snapshot = run_stats()
    assert snapshot.frames_per_second == 2.0
    assert run_stats(elapsed=0.0).frames_per_second == 0.0
    assert json.loads(json.dumps(snapshot.to_dict()))["frames_per_second"] == 2.0
    header, row = str(snapshot).splitlines()
    assert header.split() == ["run", "elapsed", "in", "out", "shed", "failed", "held", "frames/s", "p50", "p99"]
    assert row.split("  ")[0] == "run 0"
    assert len(header) == len(row)


def test_observe_imports_nothing_heavy() -> None:
    """Torch, rich and matplotlib are imported only when they are used (structlog itself imports rich where it is)."""
    code = (
        "import sys; from aiotime.observe import stats, tables, trace, timeline, progress, meter;"
        "print([m for m in ('torch', 'rich', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.strip() == "[]"
