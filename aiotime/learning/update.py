"""Updater: from gradients to new weights: accumulation, guard, clipping, corrections, optimizer, scheduler.

add(grads) … add(grads) ─▶ mean ─▶ finite? ─▶ clip ─▶ optimizer.step ─▶ scheduler.step
                                    └ no: skip, count, say so
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.settings import made_scheduler
from aiotime.learning.weights import Weights
from aiotime.observe.log import get_logger

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
ParamGroups = Callable[[Iterable[tuple[str, torch.nn.Parameter]]], Sequence[dict[str, Any]]]

log = get_logger()


class Updater:
    """One stage's optimizer and what surrounds it.

    Args:
        weights: the stage's parameters.
        optimizer: ``params -> torch.optim.Optimizer``.
        stage: its name, for errors and logs.
        scheduler: ``optimizer -> scheduler``, stepped once per update; None: constant.
        param_groups: ``named parameters -> groups`` for the optimizer; None: all in one.
        clip_norm: the stage's gradient is scaled down to this norm; None: not.
        every: gradients averaged per update.
        guard: skip an update whose gradient is not finite.
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: OptimizerFactory,
        *,
        stage: str,
        scheduler: SchedulerFactory | None = None,
        param_groups: ParamGroups | None = None,
        clip_norm: float | None = None,
        every: int = 1,
        guard: bool = True,
    ) -> None:
        self.weights = weights
        self.stage = stage
        self.clip_norm = clip_norm
        self.every = every
        self.guard = guard
        self.updates = 0
        self.skipped = 0
        self.norm = 0.0  # of the newest gradient, where it was measured
        self.rate: Callable[[], float] | None = None  # factor on every learning rate at the next step
        self.around: Callable[[Callable[[], Any]], Any] | None = None  # takes the optimizer's step in its own way
        self._sum: list[torch.Tensor | None] = [None] * len(weights.masters)
        self.gathered = 0  # gradients in the sum
        params: Any = weights.masters
        if param_groups is not None:
            params = list(param_groups(zip(weights.names, weights.masters, strict=True)))
        try:
            self.optimizer = optimizer(params)
        except Exception as error:
            raise ConfigurationError(
                f"stage {stage!r}: the optimizer could not be made for its {len(weights.masters)} parameters: "
                f"{type(error).__name__}: {error}. Hand in a callable params -> torch.optim.Optimizer, such as "
                "functools.partial(torch.optim.Adam, lr=1e-3)"
            ) from error
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ConfigurationError(
                f"stage {stage!r}: optimizer(params) returned a {type(self.optimizer).__name__}, "
                "not a torch.optim.Optimizer"
            )
        self._check_groups()
        self.scheduler = made_scheduler(scheduler(self.optimizer), stage=stage) if scheduler is not None else None

    def _check_groups(self) -> None:
        """The optimizer has the stage's parameters, all of them and no others."""
        own = {id(master): name for name, master in zip(self.weights.names, self.weights.masters, strict=True)}
        given = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if given - own.keys():
            raise ConfigurationError(
                f"stage {self.stage!r}: the optimizer got {len(given - own.keys())} parameters of somebody else; "
                "make groups of those that param_groups is called with, not of the model's"
            )
        left_out = [name for at, name in own.items() if at not in given]
        if left_out:
            raise ConfigurationError(
                f"stage {self.stage!r}: the optimizer did not get {', '.join(left_out)}; "
                "what shall not be learned is frozen with requires_grad_(False)"
            )

    def add(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Take one gradient per parameter (None: the frame did not use it)."""
        if self.gathered == 0:
            self._sum = list(grads)
        else:
            self._sum = [
                new if old is None else old if new is None else old + new
                for old, new in zip(self._sum, grads, strict=True)
            ]
        self.gathered += 1

    @property
    def due(self) -> bool:
        """Enough gradients for an update."""
        return self.gathered >= self.every

    def own(self) -> None:
        """Keep copies of what was added so far."""
        self._sum = [None if grad is None else grad.clone() for grad in self._sum]

    def take(self) -> tuple[list[torch.Tensor | None], int]:
        """(sum of what was added, how many); nothing is left."""
        taken = self._sum, self.gathered
        self._sum, self.gathered = [None] * len(self._sum), 0
        return taken

    def put(self, grads: Sequence[torch.Tensor | None], gathered: int) -> None:
        """What `step` is to take the mean of, in place of what was added."""
        self._sum, self.gathered = list(grads), gathered

    def squared_norm(self, scale: float = 1.0) -> float:
        """Of the mean of what was added."""
        return (_norm(self._sum) / (self.gathered * scale)) ** 2 if self.gathered else 0.0

    def step(self, *, keep_old: bool, scale: float = 1.0, norm: float | None = None) -> bool:
        """Update the weights from the mean of what was added; False if it was skipped.

        Args:
            keep_old: see `Weights.update`.
            scale: what the loss had been multiplied by (float16).
            norm: to clip by in place of this stage's own (the whole model's).
        """
        if self.gathered == 0:
            return False
        grads, count = self._sum, self.gathered
        self._sum, self.gathered = [None] * len(grads), 0
        if not any(grad is not None for grad in grads):
            return False
        with torch.inference_mode(mode=False), torch.no_grad():  # a barrier's thread is in inference mode
            if count * scale != 1.0:
                grads = [None if grad is None else grad / (count * scale) for grad in grads]
            if not self._finite_and_clipped(grads, norm):
                return False
            for master, grad in zip(self.weights.masters, grads, strict=True):
                master.grad = grad
        factor = self.rate() if self.rate is not None else 1.0
        if factor == 1.0:
            self.weights.update(self._advance, keep_old=keep_old)
        else:
            self.weights.update(lambda: self._step_with(factor), keep_old=keep_old)
        for master in self.weights.masters:
            master.grad = None
        self.updates += 1
        if self.scheduler is not None:
            self.scheduler.step()
        return True

    def _advance(self) -> None:
        if self.around is None:
            self.optimizer.step()
        else:
            self.around(self.optimizer.step)

    def _step_with(self, factor: float) -> None:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * factor
        try:
            self._advance()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _finite_and_clipped(self, grads: list[torch.Tensor | None], norm: float | None) -> bool:
        if not self.guard and self.clip_norm is None:
            return True
        if norm is None:
            norm = _norm(grads)
        self.norm = norm
        if not math.isfinite(norm):
            if self.guard:
                self.skipped += 1
                log.warning("learning.skipped", stage=self.stage, norm=norm, skipped=self.skipped)
                return False
        elif self.clip_norm is not None and norm > self.clip_norm:
            for at, grad in enumerate(grads):
                if grad is not None:
                    # in single precision, as torch.nn.utils.clip_grad_norm_ has it
                    grads[at] = grad * (self.clip_norm / (torch.tensor(norm, device=grad.device) + 1e-6))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scheduler and what was gathered; tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "updates": self.updates,
            "skipped": self.skipped,
            "gathered": self.gathered,
            "sum": list(self._sum),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.updates, self.skipped, self.gathered = state["updates"], state["skipped"], state["gathered"]
        self._sum = [
            None if grad is None else grad.to(master.device)
            for grad, master in zip(state["sum"], self.weights.masters, strict=True)
        ]


def _norm(grads: Sequence[torch.Tensor | None]) -> float:
    """Of all of them together, sparse ones included; 0 where there is none."""
    present = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
    return float(torch.nn.utils.get_total_norm(present)) if present else 0.0
