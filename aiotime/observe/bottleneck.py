"""What limits a stream: a rule over one snapshot, and its sentence. Pure functions behind `Stats.limit` and its kin.

The first that holds:

1. ``"stage"``: the busiest stage is busy at least 80 % of the time. Stages with one worker on one device share
   it, so there their shares are added up.
2. ``"consumer"``: more finished frames wait to be taken now (at least two) than are in flight, or at least one
   has waited on average.
3. ``"budget"``: a stage idles at least 25 % of the time because all credits are held downstream.
4. ``"stage"``: the busiest stage is busy at least half of the time.
5. ``"source"``: every stage mostly waits for input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from aiotime.observe.tables import duration, share

if TYPE_CHECKING:
    from aiotime.observe.stats import StageStats, Stats

SATURATED = 0.8  # busy share from which a stage limits the stream, whatever else is to be seen
MOSTLY = 0.5  # busy share below which a stage mostly waits, so that it cannot be what limits
STARVED_OF_CREDITS = 0.25  # share of idling for want of credits from which the budget is what limits

Limit = Literal["stage", "source", "consumer", "budget"]


def busiest(stages: Sequence[StageStats]) -> StageStats | None:
    """The stage under most pressure: of the busiest worker (or set of them) the busiest stage; None if none ran."""
    ran = [stage for stage in stages if stage.frames]
    return max(ran, key=lambda stage: (pressure(stage, stages), stage.busy), default=None)


def pressure(stage: StageStats, stages: Sequence[StageStats]) -> float:
    """How busy, between 0 and 1, the workers of ``stage`` are with it and with the stages that share them."""
    return min(1.0, sum(other.busy for other in stages if _share_a_worker(stage, other)))


def find_limit(stats: Stats) -> Limit | None:
    """What limits the stream by the rule above; None when nothing has run and nothing waits."""
    stage = busiest(stats.stages)
    busy = 0.0 if stage is None else pressure(stage, stats.stages)
    if busy >= SATURATED:
        return "stage"
    if stats.undelivered > max(1, stats.in_flight) or stats.undelivered_mean >= 1:
        return "consumer"
    if stage is None:
        return None
    if _shortest_of_credits(stats.stages).blocked_output >= STARVED_OF_CREDITS:
        return "budget"
    return "stage" if busy >= MOSTLY else "source"


def diagnose(stats: Stats) -> str:
    """What limits the stream, as a sentence with the numbers behind it."""
    stage, limit = busiest(stats.stages), find_limit(stats)
    waiting = f"{stats.undelivered} finished frames wait to be taken now"
    if stage is None:
        if limit == "consumer":
            return f"the consumer limits the stream: {waiting}, and no stage has had anything to do"
        return "nothing has run yet"
    if limit == "stage":
        return _diagnose_stage(stage, stats.stages)
    slowest = f"the busiest stage, {stage.name!r}, is busy {share(stage.busy)}"
    if limit == "source":
        return f"the source limits the stream: {slowest} and waits for input {share(stage.blocked_input)}"
    if limit == "consumer":
        if stats.undelivered_mean:
            waiting += f", {stats.undelivered_mean:.1f} did on average"
        return f"the consumer limits the stream: {waiting}; {slowest}"
    held = _shortest_of_credits(stats.stages)
    return (
        f"the budget of {stats.budget_frames} frames in flight limits the stream: stage {held.name!r} was idle "
        f"{share(held.blocked_output)} for want of a credit; {slowest}; allow more frames in flight"
    )


def _diagnose_stage(stage: StageStats, stages: Sequence[StageStats]) -> str:
    together = [other.name for other in stages if _share_a_worker(stage, other)]
    if len(together) > 1:
        return (
            f"device {stage.device!r} limits the stream: its stages {', '.join(map(repr, together))} are busy "
            f"{share(pressure(stage, stages))} together, {stage.name!r} the most ({share(stage.busy)})"
        )
    what = "frame" if stage.batch_mean == 1 else f"batch of {stage.batch_mean:.1f}"
    return (
        f"stage {stage.name!r} limits the stream: busy {share(stage.busy)}, "
        f"waiting for input {share(stage.blocked_input)}, {duration(stage.service_p50)} per {what}"
    )


def _shortest_of_credits(stages: Sequence[StageStats]) -> StageStats:
    return max(stages, key=lambda stage: stage.blocked_output)


def _share_a_worker(one: StageStats, other: StageStats) -> bool:
    """Both run on one thread (or loop, or device stream): a device's stages of one worker each share it."""
    return one.name == other.name or (one.device == other.device and one.workers == other.workers == 1)
