"""Delayed: pipelined back-propagation; each frame's own activations, weights of its forward or newer ones.

    stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 …
    stage 1      F0 F1 F2 B0 F3 B1 F4 B2 …          S = 4, "1f1b": stage k is S-1-k frames ahead
    stage 2         F0 F1 B0 F2 B1 F3 B2 …
    stage 3            F0 B0 F1 B1 F2 B2 …
"""

from __future__ import annotations

from typing import Any, Literal

from aiotime.errors import ConfigurationError
from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.order import Order, event, lockstep, one_forward_one_backward
from aiotime.learning.rule import Rule

Which = Literal["stashed", "current"]
Sequence = Literal["event", "1f1b", "lockstep"]

_ORDERS = {"event": event, "1f1b": one_forward_one_backward, "lockstep": lockstep}


class Delayed(Rule):
    """Every stage learns from every frame, up to S-1-k updates late at stage k (Harlap et al., PipeDream, SOSP 2019).

    Args:
        weights: those a backward sees: "stashed", of the frame's own forward; "current", the newest.
        order: "event" runs a backward as soon as it can: delay at most S-1-k, less where the stream leaves time.
            "1f1b" alternates strictly: delay exactly S-1-k and the same bits on every run. "lockstep": 2(S-1-k), what
            synchronous ticks give (Kosson et al. 2020).
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(self, *, weights: Which = "stashed", order: Sequence = "event", **settings: Any) -> None:
        super().__init__(**settings)
        if weights not in ("stashed", "current"):
            raise ConfigurationError(f'weights must be "stashed" or "current", not {weights!r}')
        if order not in _ORDERS:
            raise ConfigurationError(f'order must be "event", "1f1b" or "lockstep", not {order!r}')
        self.which = weights
        self.stashes = weights != "current"
        self.sequence = order

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """A strict order counts; a frame learned from out of turn would break it."""
        return self.sequence == "event"

    def order(self, stage: int, stages: int) -> Order:
        """As the user chose."""
        return _ORDERS[self.sequence](stage, stages)

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation; stashing is a matter of what an update does to old weights."""
        learner = StageLearner(site, self)
        learner.stash = self.which == "stashed"
        return learner
