"""Lesson: how a network learns: AMPNet's two numbers, and the settings that every rule of `aiotime.learning` has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from aiotime.errors import ConfigurationError, InputError
from aiotime.learning.corrections.contract import Correction, check_all
from aiotime.learning.order import Order
from aiotime.learning.rule import Loss, PerStage, Rule
from aiotime.learning.settings import whole_number
from aiotime.learning.update import ParamGroups, SchedulerFactory

UpdatePer = Literal["gradient", "instance"]
Unused = Literal["warn", "raise", "ignore"]


def itself(output: Any) -> torch.Tensor:
    """The loss of a network whose forward returns it."""
    value: torch.Tensor = output
    return value


class Lesson(Rule):
    """Asynchronous updates (Gaunt et al., AMPNet, 2017): each stage on its own, from whatever gradients it has.

    The arguments are those of `aiotime.dynamic.Network.learn`.
    """

    without_delay = False

    def __init__(
        self,
        *,
        loss: Loss | None,
        optimizer: PerStage,
        min_update_frequency: int,
        update_per: UpdatePer,
        weights: Literal["stashed", "current"],
        corrections: Sequence[Correction],
        unused: Unused,
        scheduler: SchedulerFactory | None,
        param_groups: ParamGroups | None,
        clip_norm: float | None,
        guard: bool,
        precision: torch.dtype | None,
        supervised: bool | None,
    ) -> None:
        super().__init__(
            loss=itself if loss is None else loss,
            optimizer=optimizer,
            scheduler=scheduler,
            param_groups=param_groups,
            clip_norm=clip_norm,
            guard=guard,
            precision=precision,
            supervised=False if loss is None else supervised,
        )
        whole_number("min_update_frequency", min_update_frequency, "a number of gradients or instances")
        if update_per not in ("gradient", "instance"):
            raise ConfigurationError(f'update_per must be "gradient" or "instance", not {update_per!r}')
        if weights not in ("stashed", "current"):
            raise ConfigurationError(f'weights must be "stashed" or "current", not {weights!r}')
        if unused not in ("warn", "raise", "ignore"):
            raise ConfigurationError(f'unused must be "warn", "raise" or "ignore", not {unused!r}')
        if isinstance(corrections, Correction):
            raise ConfigurationError(f"corrections is a list: corrections=[{type(corrections).__name__}(...)]")
        for correction in corrections:
            if getattr(correction, "changes", None) in ("backward", "order"):
                raise ConfigurationError(
                    f"{type(correction).__name__} changes the {correction.changes} of a pipeline's stage; a network's "
                    "stages take corrections of the forward's weights, of gradients, rates and steps"
                )
        check_all(corrections, weights)
        self.given = loss
        self.frequency = min_update_frequency
        self.per_instance = update_per == "instance"
        self.stash = weights == "stashed"
        self.corrections = list(corrections)
        self.unused = unused

    def loss_value(self, output: Any, target: Any, *, frame: int, key: Any) -> torch.Tensor:
        """As for any rule."""
        if self.given is None and not isinstance(output, torch.Tensor):
            raise InputError(
                f"instance {frame}: forward returned a {type(output).__name__}; where learn gets no loss=..., it must "
                "return the loss, a tensor with one number",
                frame=frame,
                key=key,
            )
        return super().loss_value(output, target, frame=frame, key=key)

    def order(self, stage: int, stages: int) -> Order:
        """None that is fixed: the instances decide."""
        return Order()

    def equals(self, other: Lesson) -> bool:
        """Whether both may be followed at the same time."""
        mine, theirs = vars(self), vars(other)
        return mine.keys() == theirs.keys() and all(
            repr(mine[name]) == repr(theirs[name]) if name == "corrections" else _same(mine[name], theirs[name])
            for name in mine
        )

    def continues(self, other: Lesson) -> bool:
        """Whether ``other`` may go on with this one's optimizers."""
        return (
            _same(self.optimizer, other.optimizer)
            and _same(self.scheduler, other.scheduler)
            and _same(self.param_groups, other.param_groups)
            and repr(self.corrections) == repr(other.corrections)
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):
        return one.func == other.func and one.args == other.args and one.keywords == other.keywords
    return bool(one is other or one == other)
