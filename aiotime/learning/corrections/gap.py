"""GapAware: a gradient counts less where the weights have moved far since its forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction, Corrector, Maybe, Place, Tensors


class GapAware(Correction):
    """Each element of a late gradient is divided by how many usual steps its weight has moved meanwhile.

    Barkai et al., Gap-Aware Mitigation of Gradient Staleness, ICLR 2020, per parameter:

        g ← g / (1 + abs(θ_now - θ_forward) / (η · (sqrt(EMA(v²)) + ε)))

    v is the last step divided by η, whatever optimizer took it, so η · sqrt(EMA(v²)) is the root of the mean square
    step. It needs the weights of the forward: ``weights="stashed"``, "predicted" or "double-buffered". Memory: one
    version (the mean).

    Args:
        decay: of the mean of squares, whose start is corrected for as in Adam.
        eps: ε.
    """

    changes = "gradient"

    def __init__(self, decay: float = 0.999, eps: float = 1e-8) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"decay must be in [0, 1), not {decay}")
        if not eps > 0:
            raise ConfigurationError(f"eps must be positive, not {eps}")
        self.decay, self.eps = decay, eps

    def check(self, weights: str) -> None:
        """The weights of the forward must be there."""
        if weights == "current":
            raise ConfigurationError(
                'GapAware compares with the weights of the forward, which weights="current" does not keep; use '
                'weights="stashed"'
            )

    def stage(self, place: Place) -> Corrector:
        """One mean per stage."""
        return _Damper(place, self.decay, self.eps)


class _Damper(Corrector):
    wants_moves = True

    def __init__(self, place: Place, decay: float, eps: float) -> None:
        super().__init__(place)
        self._decay, self._eps = decay, eps
        self._squares: Tensors | None = None
        self._seen = 0

    def gradients(self, grads: Maybe, *, used: Sequence[torch.Tensor], delay: int) -> Maybe:
        if delay == 0 or self._squares is None:
            return grads
        start = 1 - self._decay**self._seen
        found: Maybe = []
        rows = zip(grads, used, self._squares, self.place.weights.masters, self.place.groups(), strict=True)
        for grad, then, square, now, group in rows:
            if grad is None or group is None:
                found.append(grad)
                continue
            usual = (square / start).sqrt_().add_(float(group["lr"]) * self._eps)
            gap = (now.detach() - then.detach()).abs_()
            found.append(grad / gap.div_(usual).add_(1))
        return found

    def updated(self, moves: Tensors) -> None:
        if self._squares is None:
            self._squares, self._seen = [torch.zeros_like(move) for move in moves], 0
        self._seen += 1
        for square, move in zip(self._squares, moves, strict=True):
            square.mul_(self._decay).addcmul_(move, move, value=1 - self._decay)

    def reset(self) -> None:
        self._squares = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._squares = state["seen"], state["squares"]

    def nbytes(self) -> int:
        return sum(square.numel() * square.element_size() for square in self._squares or ())
