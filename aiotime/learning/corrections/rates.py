"""LearningRateRescheduling and DelayScaling: smaller steps for later gradients."""

from __future__ import annotations

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction, Corrector, Place


class LearningRateRescheduling(Correction):
    """Steps are divided by the delay at first, and less and less so (Yang et al., PipeMare, MLSys 2021, its T1):

        η_D = η / D^(1 - min(step / K, 1))        for D ≥ 1; step counts the stage's updates

    Args:
        steps: K, updates until the full rate; about a quarter of the first phase of a schedule, says the paper.
    """

    changes = "rate"

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ConfigurationError(f"steps is a number of updates from 1, not {steps}")
        self.steps = steps

    def stage(self, place: Place) -> Corrector:
        """Counts with the stage's updates."""
        return _Rescheduler(place, self.steps)


class _Rescheduler(Corrector):
    def __init__(self, place: Place, steps: int) -> None:
        super().__init__(place)
        self._steps = steps

    def rate(self, delay: int) -> float:
        if delay < 2:
            return 1.0
        return float(delay ** -(1 - min(self.place.updater.updates / self._steps, 1)))


class DelayScaling(Correction):
    """Steps shrink with the delay for good: η_D = η · (1 + D)^-power.

    The simplest form of staleness-aware rates (Zhang et al., Staleness-aware Async-SGD, IJCAI 2016, divides by the
    staleness).

    Args:
        power: 0 changes nothing.
    """

    changes = "rate"

    def __init__(self, power: float = 1.0) -> None:
        if not power >= 0:
            raise ConfigurationError(f"power must not be negative, not {power}")
        self.power = power

    def stage(self, place: Place) -> Corrector:
        """A factor of the delay alone."""
        return _Scaler(place, self.power)


class _Scaler(Corrector):
    def __init__(self, place: Place, power: float) -> None:
        super().__init__(place)
        self._power = power

    def rate(self, delay: int) -> float:
        return float((1 + delay) ** -self._power)
