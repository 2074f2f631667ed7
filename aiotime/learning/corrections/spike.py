"""SpikeCompensation: a late gradient gets at once the weight that it would have gathered had it come in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction, Corrector, Place


class SpikeCompensation(Correction):
    """For SGD with momentum m and a gradient that is D updates late (Kosson et al. 2020, "spike compensation"):

        v ← m v + g
        θ ← θ - η (a v + b g)        a = m^D,  b = (1 - m^D) / (1 - m)

    A gradient in time would by now have moved the weights by b·ηg; a v goes on as it would then. D = 0 is plain SGD.
    Weight decay is part of g. Memory: none.
    """

    changes = "step"

    def stage(self, place: Place) -> Corrector:
        """For SGD with momentum only."""
        optimizer = place.updater.optimizer
        groups = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.SGD) or not all(group["momentum"] > 0 for group in groups):
            raise ConfigurationError(
                f"stage {place.stage!r}: SpikeCompensation spreads a gradient as momentum would, so it needs "
                f"torch.optim.SGD(momentum=...) rather than {type(optimizer).__name__}"
                f"{'' if not isinstance(optimizer, torch.optim.SGD) else ' without momentum'}"
            )
        if any(group["nesterov"] or group["dampening"] for group in groups):
            raise ConfigurationError(
                f"stage {place.stage!r}: SpikeCompensation is defined for v ← m v + g; leave out nesterov and dampening"
            )
        return _Compensator(place)


class _Compensator(Corrector):
    def step(self, step: Callable[[], Any], delay: int) -> None:
        if delay == 0:
            step()
            return
        masters = [p for p in self.place.weights.masters if p.grad is not None]
        states = self.place.updater.optimizer.state
        groups = {id(p): group for p, group in zip(self.place.weights.masters, self.place.groups(), strict=True)}
        with torch.no_grad():
            grads = [_decayed(p, groups[id(p)]) for p in masters]  # before the weights move
            step()  # θ ← θ - η v; what is left is η ((1 - a) v - b g)
            for p, g in zip(masters, grads, strict=True):
                group = groups[id(p)]
                if group is None or g is None:
                    continue
                m, lr = group["momentum"], float(group["lr"])
                a, b = m**delay, (delay if m == 1 else (1 - m**delay) / (1 - m))
                p.data.add_(states[p]["momentum_buffer"], alpha=lr * (1 - a)).add_(g, alpha=-lr * b)


def _decayed(p: torch.Tensor, group: dict[str, Any] | None) -> torch.Tensor | None:
    """The gradient as SGD sees it."""
    if group is None or p.grad is None:
        return None
    g = -p.grad if group["maximize"] else p.grad
    return g.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else g
