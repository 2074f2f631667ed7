"""WeightPrediction: the forward reads the weights that its gradient will meet, guessed by a straight line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.corrections.contract import Correction, Corrector, Place, Tensors

Form = Literal["velocity", "difference"]
Group = Mapping[str, Any]
State = Mapping[str, Any]


class WeightPrediction(Correction):
    """Linear weight prediction (Chen et al., SpecTrain, 2018; Kosson et al., Pipelined Backpropagation at Scale, 2020).

    A forward whose gradient will be D updates late reads

        θ̂ = θ - D · η v                  "velocity": the step that the optimizer would take again
        θ̂ = θ + D · (θ_t - θ_{t-1})      "difference": the last step, whatever made it

    where η v is, by optimizer,

        SGD with momentum       η · momentum buffer
        Adam, AdamW             η · m̂ / (sqrt(v̂) + ε), and η · λ · θ for AdamW's weight decay
        RMSprop with momentum   η · momentum buffer
        SGD, RMSprop without    the last step (there is no velocity; the same as "difference")

    The graph keeps θ̂, so that the backward belongs to the same function as its forward; under ``weights="current"``
    the backward reads the newest weights instead. Memory: a version of the weights per frame in flight (one in all
    under "current"), and one for the last step.

    Args:
        form: "velocity", for the optimizers above; "difference", for any.
    """

    changes = "forward"

    def __init__(self, form: Form = "velocity") -> None:
        if form not in ("velocity", "difference"):
            raise ConfigurationError(f'form must be "velocity" or "difference", not {form!r}')
        self.form = form

    def check(self, weights: str) -> None:
        """Only where nothing else decides what a forward reads."""
        if weights == "predicted":
            raise ConfigurationError(
                'weights="predicted" is WeightPrediction("velocity") already; leave it out of corrections, or say '
                'weights="stashed" and choose its form there'
            )
        if weights == "double-buffered":
            raise ConfigurationError(
                'weights="double-buffered" decides which version a forward reads; WeightPrediction goes with '
                'weights="stashed" or "current"'
            )

    def stage(self, place: Place) -> Corrector:
        """A predictor with the stage's optimizer."""
        return _Predictor(place, _velocity_of(place) if self.form == "velocity" else None)


Velocity = Callable[[torch.Tensor, Group, State], torch.Tensor | None]


class _Predictor(Corrector):
    def __init__(self, place: Place, velocity: Velocity | None) -> None:
        super().__init__(place)
        self._velocity = velocity
        self.wants_moves = velocity is None
        self._moves: Tensors | None = None

    def forward_weights(self, delay: int) -> Tensors | None:
        if delay == 0:
            return None
        masters = [master.detach() for master in self.place.weights.masters]
        if self._velocity is None:
            if self._moves is None:
                return None
            return [torch.add(now, move, alpha=delay) for now, move in zip(masters, self._moves, strict=True)]
        states = self.place.updater.optimizer.state
        if not states:
            return None
        factor, found = self.place.rate(delay), []
        for now, master, group in zip(masters, self.place.weights.masters, self.place.groups(), strict=True):
            state = states.get(master)
            step = self._velocity(now, group, state) if group is not None and state else None
            lr = 0.0 if group is None else float(group["lr"])
            found.append(now.clone() if step is None else torch.add(now, step, alpha=-delay * factor * lr))
        return found

    def updated(self, moves: Tensors) -> None:
        if self.wants_moves:
            self._moves = moves

    def reset(self) -> None:
        self._moves = None

    def state_dict(self) -> dict[str, Any]:
        return {"moves": self._moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moves = state["moves"]

    def nbytes(self) -> int:
        return sum(move.numel() * move.element_size() for move in self._moves or ())


def _velocity_of(place: Place) -> Velocity | None:
    """``(θ, group, state) -> v`` for the stage's optimizer; None where the last step is all there is."""
    optimizer = place.updater.optimizer
    groups = optimizer.param_groups
    if isinstance(optimizer, torch.optim.Adam):  # and AdamW
        return _adam
    if isinstance(optimizer, torch.optim.SGD | torch.optim.RMSprop):
        return _momentum if any(group["momentum"] for group in groups) else None
    raise ConfigurationError(
        f"stage {place.stage!r}: the velocity of {type(optimizer).__name__} is not known (only that of SGD, Adam, "
        'AdamW and RMSprop is); use WeightPrediction("difference"), which works with any optimizer'
    )


def _momentum(now: torch.Tensor, group: Group, state: State) -> torch.Tensor | None:
    return state.get("momentum_buffer")


def _adam(now: torch.Tensor, group: Group, state: State) -> torch.Tensor | None:
    steps = float(state["step"])
    if steps == 0:
        return None
    beta1, beta2 = group["betas"]
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    spread = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    v: torch.Tensor = (state["exp_avg"] / (1 - beta1**steps)).div_(spread)
    if group["weight_decay"] and group.get("decoupled_weight_decay"):
        v.add_(now, alpha=group["weight_decay"])
    return v
