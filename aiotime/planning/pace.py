"""The pace of a pipeline: what one frame costs in a stage that learns, and how many frames a rule's order lets through.

Pure numbers. A stage may not begin a forward while more than ``order.ahead`` earlier frames wait for their backward,
and a backward waits for the stages above it: with few frames ahead the way up and back sets the pace, not the slowest
stage. `Exact` (none ahead) takes the sum of all stages for each frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiotime.learning.rule import Rule


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of one frame."""

    forward: float
    backward: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.update

    def scaled(self, forward: float, backward: float, update: float) -> Phases:
        """Each times a factor of its own."""
        return Phases(self.forward * forward, self.backward * backward, self.update * update)


def added(phases: Sequence[Phases]) -> Phases:
    """One after the other."""
    return Phases(
        sum(each.forward for each in phases), sum(each.backward for each in phases), sum(each.update for each in phases)
    )


def one_by_one(rule: Rule, stages: int) -> bool:
    """Whether each frame is learned from before the next may enter the first of several stages."""
    order = rule.order(0, stages)
    return stages > 1 and order.ahead == 0 and order.batch in (None, 1) and rule.reach(0, stages) == stages - 1


def period(seconds: Sequence[float], rule: Rule | None, *, first: int = 0) -> float:
    """Seconds between two frames when the stream never pauses.

    Args:
        seconds: of one frame in each stage, with the transfers into it.
        rule: None: nothing is learned, and the slowest stage sets the pace.
        first: the first stage that learns; those below are done with a frame after its forward.
    """
    slowest = max(seconds)
    if rule is None:
        return slowest
    stages = len(seconds)
    longest = slowest
    for stage in range(first, stages):
        order = rule.order(stage, stages)
        way = sum(seconds[stage : stage + 1 + rule.reach(stage, stages)])
        longest = max(longest, way / (order.ahead + 1))
        if order.batch is not None:  # it fills before each mini-batch and empties after it
            learning = seconds[first:]
            filled = sum(learning) + (order.batch - 1) * max(learning)
            longest = max(longest, filled / order.batch)
    return longest
