"""Exact: sequential back-propagation, one frame in flight. The yardstick."""

from __future__ import annotations

from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.norm import WholeNormLearner
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule


class Exact(Rule):
    """Back-propagation as on one device: a frame enters when the one before has been learned from.

    θ_k ← θ_k - η ∂L_t/∂θ_k for every frame t, all gradients taken at the weights of the forward. Delay 0; no two
    stages work at the same time.

    Args are those of `aiotime.learning.rule.Rule`.
    """

    accepts_late = True
    without_delay = True

    def order(self, stage: int, stages: int) -> Order:
        """A forward waits for every backward before it, also that of a frame without a target."""
        return Order(0, strict=True, meet=self.clip == "global")

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation."""
        return WholeNormLearner(site, self) if self.clip == "global" else StageLearner(site, self)
