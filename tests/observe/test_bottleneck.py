"""What limits a stream: each line of the rule, its order, and the sentences."""

from __future__ import annotations

from typing import Any

from aiotime.observe.stats import StageStats, Stats


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


def test_nothing_has_run() -> None:
    """Before the first job there is no bottleneck, and the sentence says why."""
    for snapshot in (stats(), stats(stage(frames=0))):
        assert snapshot.limit is None
        assert snapshot.bottleneck is None
        assert snapshot.diagnosis == "nothing has run yet"


def test_busiest_stage_limits() -> None:
    """A saturated stage is what limits, and the sentence has its numbers."""
    snapshot = stats(
        stage("decode", busy=0.98, blocked_input=0.01), stage("model", "cpu:1", busy=0.4, blocked_input=0.6)
    )
    assert snapshot.limit == "stage"
    assert snapshot.bottleneck == "decode"
    assert snapshot.diagnosis == "stage 'decode' limits the stream: busy 98 %, waiting for input 1 %, 10.0 ms per frame"


def test_saturated_stage_limits_even_if_frames_wait_for_the_consumer() -> None:
    """A burst of results that the consumer has not taken yet does not hide the slow stage."""
    snapshot = stats(stage(busy=0.9), frames_in=100, frames_out=50, frames_shed=0, frames_failed=0, in_flight=5)
    assert snapshot.undelivered == 45
    assert snapshot.bottleneck == "decode"


def test_source_limits() -> None:
    """Where every stage mostly waits for input there is no bottleneck among them."""
    snapshot = stats(stage("decode", busy=0.3, blocked_input=0.68), stage("model", "cpu:1", busy=0.1), frames_out=90)
    assert snapshot.limit == "source"
    assert snapshot.bottleneck is None
    assert snapshot.diagnosis == (
        "the source limits the stream: the busiest stage, 'decode', is busy 30 % and waits for input 68 %"
    )


def test_consumer_limits() -> None:
    """Finished frames that nobody takes, while hardly any are in flight: the consumer is slow."""
    snapshot = stats(
        stage("decode", busy=0.3, blocked_input=0.7),
        frames_in=100,
        frames_out=92,
        frames_shed=0,
        frames_failed=0,
        in_flight=0,
    )
    assert snapshot.undelivered == 8
    assert snapshot.limit == "consumer"
    assert snapshot.bottleneck is None
    assert snapshot.diagnosis.startswith("the consumer limits the stream: 8 finished frames wait to be taken")


def test_consumer_limited_on_average() -> None:
    """After the last frame was taken nothing waits any more; the mean still tells."""
    snapshot = stats(stage("decode", busy=0.3, blocked_input=0.7), frames_out=97, in_flight=0, undelivered_mean=4.25)
    assert snapshot.undelivered == 0
    assert snapshot.limit == "consumer"
    assert "0 finished frames wait to be taken now, 4.2 did on average" in snapshot.diagnosis


def test_stuck_consumer() -> None:
    """Nothing ran between two snapshots because the consumer takes nothing: that is told, too."""
    snapshot = stats(stage(frames=0), frames_in=8, frames_out=0, frames_shed=0, frames_failed=0, in_flight=0)
    assert snapshot.limit == "consumer"
    assert snapshot.bottleneck is None
    assert snapshot.diagnosis == (
        "the consumer limits the stream: 8 finished frames wait to be taken now, and no stage has had anything to do"
    )


def test_one_finished_frame_is_no_slow_consumer() -> None:
    """A snapshot taken in the body of the consumer's loop may find a frame that has finished just now."""
    snapshot = stats(stage(busy=0.3), frames_in=94, frames_out=90, frames_shed=2, frames_failed=1, in_flight=0)
    assert snapshot.undelivered == 1
    assert snapshot.limit == "source"


def test_budget_limits() -> None:
    """A stage that idles for want of a credit, none of them saturated: too few frames may be in flight."""
    snapshot = stats(
        stage("decode", busy=0.25, blocked_output=0.75),
        stage("model", "cpu:1", busy=0.25, blocked_input=0.75),
        budget_frames=1,
        in_flight=1,
        frames_in=94,
    )
    assert snapshot.limit == "budget"
    assert snapshot.bottleneck is None
    assert "the budget of 1 frames in flight limits" in snapshot.diagnosis
    assert "'decode' was idle 75 % for want of a credit" in snapshot.diagnosis


def test_half_busy_stage_is_named() -> None:
    """Between half and saturated the busiest stage is still the best guess, and the numbers say how good it is."""
    snapshot = stats(stage("decode", busy=0.6, blocked_input=0.4), stage("model", "cpu:1", busy=0.2))
    assert snapshot.limit == "stage"
    assert snapshot.bottleneck == "decode"
    assert "busy 60 %, waiting for input 40 %" in snapshot.diagnosis


def test_stages_that_share_a_worker_limit_together() -> None:
    """Two half-busy stages on one thread saturate it; a busier stage on a thread of its own does not."""
    snapshot = stats(
        stage("decode", busy=0.45), stage("post", busy=0.52), stage("model", "cpu:1", busy=0.7, blocked_input=0.3)
    )
    assert snapshot.limit == "stage"
    assert snapshot.bottleneck == "post"
    assert snapshot.diagnosis == (
        "device 'cpu:0' limits the stream: its stages 'decode', 'post' are busy 97 % together, 'post' the most (52 %)"
    )


def test_workers_of_their_own_are_not_added_up() -> None:
    """A stage with several workers has threads of its own, also where it names the same device."""
    snapshot = stats(stage("decode", busy=0.45, workers=2), stage("post", busy=0.4))
    assert snapshot.limit == "source"


def test_stage_that_never_ran_is_no_bottleneck() -> None:
    """Only stages with jobs are compared."""
    assert stats(stage("decode", busy=0.9), stage("model", "cpu:1", frames=0, busy=1.0)).bottleneck == "decode"
