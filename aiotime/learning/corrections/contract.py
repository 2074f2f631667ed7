"""Correction: a remedy for a known delay, as the user writes it; Corrector: what it is at one stage.

The runtime knows exactly how late each gradient is, so a correction is told the delay D of the frame in hand, in
updates of its stage. It may change one or two of these things; two corrections of a rule never change the same:

    forward     the weights that a forward reads           gradient    before it goes to the optimizer
    backward    the weights that a backward reads          rate        a factor on every learning rate
    order       how many frames may be in flight           step        how the optimizer's step is taken
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.learning.order import Order
from aiotime.learning.update import Updater
from aiotime.learning.weights import Weights

Tensors = list[torch.Tensor]
Maybe = list[torch.Tensor | None]
Thing = Literal["forward", "backward", "gradient", "rate", "step", "order"]

_SAID = {
    "forward": "the weights of the forward",
    "backward": "the weights of the backward",
    "gradient": "the gradient",
    "rate": "the learning rate",
    "step": "the optimizer's step",
    "order": "the frames in flight",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A stage as a corrector sees it.

    Args:
        weights: its parameters; updater: its optimizer.
        rate: delay -> the factor that all corrections together put on its learning rates.
    """

    weights: Weights
    updater: Updater
    rate: Callable[[int], float]

    @property
    def stage(self) -> str:
        """Its name."""
        return self.updater.stage

    def groups(self) -> list[dict[str, Any] | None]:
        """The optimizer's parameter group of each master; None for one that the optimizer does not have."""
        by_id = {id(p): group for group in self.updater.optimizer.param_groups for p in group["params"]}
        return [by_id.get(id(master)) for master in self.weights.masters]


class Corrector:
    """What a correction does at one stage; every hook leaves things as they are unless it is overridden.

    All are called where the stage's jobs run, outside autograd. A delay of 0 means that nothing happened between this
    frame's forward and now: then there is nothing to correct, and plain training must come out, bit for bit.
    """

    wants_moves = False  # `updated` is to be called

    def __init__(self, place: Place) -> None:
        self.place = place

    def forward_weights(self, delay: int) -> Tensors | None:
        """What a forward reads whose gradient will be ``delay`` updates late; None: the newest weights."""
        return None

    def backward_weights(self, delay: int) -> Tensors | None:
        """What a backward reads whose forward was ``delay`` updates ago; None: as the rule says."""
        return None

    def gradients(self, grads: Maybe, *, used: Sequence[torch.Tensor], delay: int) -> Maybe:
        """One frame's gradients, corrected; ``used``: the weights of its forward."""
        return grads

    def rate(self, delay: int) -> float:
        """A factor on every learning rate of an update whose gradient is ``delay`` updates late."""
        return 1.0

    def step(self, step: Callable[[], Any], delay: int) -> None:
        """Take the optimizer's step; the gradients are in ``master.grad``."""
        step()

    def updated(self, moves: Tensors) -> None:
        """The weights have just moved by ``moves``."""

    def reset(self) -> None:
        """The weights were replaced from outside: what was learned about their movement is void."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

    def nbytes(self) -> int:
        """Bytes of the tensors it keeps."""
        return 0


class Correction(ABC):
    """One entry of ``Delayed(corrections=[...])``: settings, the same for all stages."""

    changes: ClassVar[Thing]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def check(self, weights: str) -> None:  # noqa: B027 - most make sense with any
        """Raise `ConfigurationError` where it makes no sense with ``Delayed(weights=weights)``."""

    def stage(self, place: Place) -> Corrector:
        """Its half at one stage; may raise `ConfigurationError` where the stage's optimizer does not fit."""
        return Corrector(place)

    def order(self, order: Order) -> Order:
        """The order of jobs with this correction."""
        return order


def check_all(corrections: Sequence[Any], weights: str) -> None:
    """Refuse what is no correction, what clashes, and what does not fit the weights that the rule uses.

    Raises:
        ConfigurationError: says what would work.
    """
    taken: dict[str, Correction] = {}
    for correction in corrections:
        if not isinstance(correction, Correction):
            raise ConfigurationError(
                f"corrections takes instances such as WeightPrediction() or SpikeCompensation(), not {correction!r}"
            )
        other = taken.setdefault(correction.changes, correction)
        if other is not correction:
            raise ConfigurationError(
                f"{type(other).__name__} and {type(correction).__name__} both change {_SAID[correction.changes]}; "
                "keep one of them"
            )
        correction.check(weights)
    if "backward" in taken and "forward" in taken:
        raise ConfigurationError(
            f"{type(taken['forward']).__name__} makes the forward read the weights of its update, "
            f"{type(taken['backward']).__name__} makes the backward read those of the forward: keep one of them"
        )


class Corrected:
    """All correctors of one stage as one."""

    def __init__(self, corrections: Sequence[Correction], updater: Updater | None) -> None:
        self._all: list[Corrector] = []
        self.lag = 0  # the largest delay among the gradients gathered for the next update
        self.reads_other = False  # some forward or backward reads weights that are not the newest
        self.wants_moves = False  # `updated` must be told how far the weights moved
        if updater is None:  # nothing to learn here
            return
        place = Place(updater.weights, updater, self.rate)
        self._all = [correction.stage(place) for correction in corrections]
        changed = {correction.changes for correction in corrections}
        self.reads_other = bool(changed & {"forward", "backward"})
        self.wants_moves = any(corrector.wants_moves for corrector in self._all)
        if "rate" in changed:
            updater.rate = lambda: self.rate(self.lag)
        if "step" in changed:
            updater.around = self._step

    def _step(self, step: Callable[[], Any]) -> None:
        for corrector in self._all:
            if type(corrector).step is not Corrector.step:
                corrector.step(step, self.lag)
                return

    def forward_weights(self, delay: int) -> Tensors | None:
        """Of the one that has an opinion."""
        for corrector in self._all:
            if (found := corrector.forward_weights(delay)) is not None:
                return found
        return None

    def backward_weights(self, delay: int) -> Tensors | None:
        """Likewise."""
        for corrector in self._all:
            if (found := corrector.backward_weights(delay)) is not None:
                return found
        return None

    def gradients(self, grads: Maybe, *, used: Sequence[torch.Tensor], delay: int) -> Maybe:
        """Through all of them."""
        self.lag = max(self.lag, delay)
        for corrector in self._all:
            grads = corrector.gradients(grads, used=used, delay=delay)
        return grads

    def rate(self, delay: int) -> float:
        """Their product."""
        factor = 1.0
        for corrector in self._all:
            factor *= corrector.rate(delay)
        return factor

    def updated(self, moves: Tensors) -> None:
        """Tell all of them."""
        for corrector in self._all:
            corrector.updated(moves)

    def reset(self) -> None:
        """All of them."""
        for corrector in self._all:
            corrector.reset()

    def state_dict(self) -> list[dict[str, Any]]:
        """One after the other; copies."""
        return [pytree.tree_map(_copied, corrector.state_dict()) for corrector in self._all]

    def load_state_dict(self, state: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Go on from `state_dict`, on ``device``."""
        for corrector, own in zip(self._all, state, strict=True):
            corrector.load_state_dict(pytree.tree_map(lambda leaf: _copied(leaf, device), own))

    def nbytes(self) -> int:
        """In all."""
        return sum(corrector.nbytes() for corrector in self._all)


def _copied(leaf: Any, device: torch.device | None = None) -> Any:
    return leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf
