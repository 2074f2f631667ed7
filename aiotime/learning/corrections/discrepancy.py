"""DiscrepancyCorrection: a backward reads what the weights of its forward are thought to have been."""

from __future__ import annotations

from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction, Corrector, Place, Tensors


class DiscrepancyCorrection(Correction):
    """The weights of the forward, guessed from the newest and how they move of late (PipeMare, MLSys 2021, its T2).

    For a backward whose forward was D updates ago (the paper's τ_f - τ_b):

        backward reads   θ - D · δ
        δ ← γ δ + (1 - γ)(θ_{t+1} - θ_t)        γ = d^(1/D)

    It takes the place of stashed weights, so it goes with ``weights="current"`` alone. Memory: δ and one scratch
    version, however many frames are in flight.

    Args:
        d: what is left of a step after D further ones, between 0 and 1; 0.135 (e^-2) in the paper.
    """

    changes = "backward"

    def __init__(self, d: float = 0.135) -> None:
        if not 0 < d < 1:
            raise ConfigurationError(f"d must be between 0 and 1, not {d}")
        self.d = d

    def check(self, weights: str) -> None:
        """Stashed weights have no discrepancy."""
        if weights != "current":
            raise ConfigurationError(
                f"DiscrepancyCorrection guesses the weights of the forward, which weights={weights!r} keeps; "
                'use it with weights="current"'
            )

    def stage(self, place: Place) -> Corrector:
        """One δ per stage."""
        return _Guesser(place, self.d)


class _Guesser(Corrector):
    wants_moves = True

    def __init__(self, place: Place, d: float) -> None:
        super().__init__(place)
        self._d = d
        self._delay = 0
        self._drift: Tensors | None = None

    def backward_weights(self, delay: int) -> Tensors | None:
        self._delay = delay
        if delay == 0 or self._drift is None:
            return None
        masters = self.place.weights.masters
        return [torch.sub(p.detach(), drift, alpha=delay) for p, drift in zip(masters, self._drift, strict=True)]

    def updated(self, moves: Tensors) -> None:
        if self._drift is None:
            self._drift = [torch.zeros_like(move) for move in moves]
        keep = self._d ** (1 / self._delay) if self._delay else 0.0
        for drift, move in zip(self._drift, moves, strict=True):
            drift.mul_(keep).add_(move, alpha=1 - keep)

    def reset(self) -> None:
        self._drift = None

    def state_dict(self) -> dict[str, Any]:
        return {"delay": self._delay, "drift": self._drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._delay, self._drift = state["delay"], state["drift"]

    def nbytes(self) -> int:
        return sum(drift.numel() * drift.element_size() for drift in self._drift or ())
