"""Rule: what a user says about learning, and what a rule must say to the runtime.

A rule is two small things: an order of jobs for each stage (`order`) and a pair of hands (`stage`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError
from aiotime.learning.boundary import tensors_of
from aiotime.learning.learner import Site, StageLearner, check_target
from aiotime.learning.order import Order
from aiotime.learning.settings import check_optimizer, check_scheduler, takes_target, whole_number
from aiotime.learning.update import OptimizerFactory, ParamGroups, SchedulerFactory, Updater
from aiotime.learning.weights import Weights

Loss = Callable[..., torch.Tensor]
PerStage = OptimizerFactory | Sequence[OptimizerFactory] | Mapping[str, OptimizerFactory]


class Rule(ABC):
    """Settings common to every rule.

    Args:
        loss: ``loss(output, target) -> 0-dim tensor``, or ``loss(output)`` where there are no targets.
        optimizer: ``params -> torch.optim.Optimizer``, called once per stage; a list gives one per stage, a mapping
            one per stage name with ``"*"`` for the others.
        scheduler: ``optimizer -> scheduler``, stepped once per update of its stage.
        param_groups: ``named parameters of a stage -> groups`` for the optimizer.
        clip_norm: largest norm of a stage's gradient; None: no clipping.
        clip: "stage", or "global": ``clip_norm`` is for the gradient of the whole model (rules without delay only:
            every stage waits for the norms of the others before it updates).
        update_every: frames whose gradients are averaged into one update.
        guard: skip updates whose gradient is not finite, and count them.
        precision: ``torch.bfloat16`` or ``torch.float16``: forward under autocast.
        late: frames whose targets may still come (`LATER`); their graphs are kept, the oldest are given up.
        idle: seconds without a new frame after which a strict order finishes what it has; None: only at the end.
        supervised: ``loss`` takes a target; None: seen from its signature.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        optimizer: PerStage,
        scheduler: SchedulerFactory | None = None,
        param_groups: ParamGroups | None = None,
        clip_norm: float | None = None,
        clip: Literal["stage", "global"] = "stage",
        update_every: int = 1,
        guard: bool = True,
        precision: torch.dtype | None = None,
        late: int = 64,
        idle: float | None = 1.0,
        supervised: bool | None = None,
    ) -> None:
        if not callable(loss):
            raise ConfigurationError(f"loss must be a callable (output, target) or (output), not {loss!r}")
        check_optimizer(optimizer)
        check_scheduler(scheduler)
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigurationError(f"clip_norm must be positive, not {clip_norm}")
        if clip not in ("stage", "global"):
            raise ConfigurationError(f'clip must be "stage" or "global", not {clip!r}')
        if clip == "global" and clip_norm is None:
            raise ConfigurationError('clip="global" needs the largest norm allowed: clip_norm=1.0, for instance')
        if clip == "global" and not self.without_delay:
            raise ConfigurationError(
                f"{type(self).__name__} cannot clip by the global norm: that is known once the first stage has its "
                'gradient, and by then later stages have updated from newer frames. Use clip="stage" (with S stages, '
                "clip_norm / sqrt(S) bounds the whole), or a rule without delay: Exact, Synchronous"
            )
        whole_number("update_every", update_every, "a number of frames")
        whole_number("late", late, "a number of frames", least=0)
        if precision not in (None, torch.bfloat16, torch.float16):
            raise ConfigurationError(f"precision must be torch.bfloat16 or torch.float16, not {precision}")
        if idle is not None and not idle > 0:
            raise ConfigurationError(f"idle must be positive seconds or None, not {idle}")
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.param_groups = param_groups
        self.clip_norm = clip_norm
        self.clip = clip
        self.update_every = update_every
        self.guard = guard
        self.precision = precision
        self.late = late
        self.idle = idle
        self.supervised = takes_target(loss) if supervised is None else supervised

    # ------------------------------------------------------------------ what a rule says

    @abstractmethod
    def order(self, stage: int, stages: int) -> Order:
        """The order of jobs at ``stage`` of ``stages``."""

    def stage(self, site: Site) -> StageLearner:
        """The hands of one stage; back-propagation through its own graph unless the rule has others."""
        return StageLearner(site, self)

    wants_raw = False  # stages are shown the frame as it entered (`Ticket.raw`)
    without_delay = False  # no stage updates before every stage has its gradient at the same weights
    accepts_late = False  # a backward may come at any time

    def check(self, stages: int) -> None:  # noqa: B027 - most rules work with any number
        """Raise `ConfigurationError` where the rule cannot work with so many stages."""

    # ------------------------------------------------------------------ what a plan asks

    stashes = True  # a backward sees the weights of its own forward
    recompute = False  # a stage keeps its input alone, and runs its forward again before its backward

    def graphs(self, stage: int, stages: int) -> int:
        """Frames whose graph (with ``recompute``: whose input) ``stage`` holds at most; late targets not counted."""
        return self.order(stage, stages).ahead + 1

    def versions(self, stage: int, stages: int) -> int:
        """Versions of its weights that ``stage`` holds at most, the newest counted."""
        if not self.stashes or self.order(stage, stages).batch is not None:
            return 1  # a mini-batch is updated when no graph of it is left
        return 1 + math.ceil((self.graphs(stage, stages) - 1) / self.update_every)

    def reach(self, stage: int, stages: int) -> int:
        """Stages above ``stage`` that its backward of a frame waits for; 0 where each has a loss of its own."""
        above, reach = stages - 1 - stage, self.order(stage, stages).reach
        return above if reach is None else min(reach, above)

    # ------------------------------------------------------------------ what the hands use

    def updater(self, site: Site, weights: Weights) -> Updater:
        """The optimizer of one stage."""
        return Updater(
            weights,
            self._factory(site),
            stage=site.name,
            scheduler=self.scheduler,
            param_groups=self.param_groups,
            clip_norm=self.clip_norm,
            every=self.update_every,
            guard=self.guard,
        )

    def _factory(self, site: Site) -> OptimizerFactory:
        given = self.optimizer
        if isinstance(given, Mapping):
            if site.name in given:
                return given[site.name]
            if "*" in given:
                return given["*"]
            raise ConfigurationError(
                f'no optimizer for stage {site.name!r}: there is {", ".join(given)}; add it, or "*" for all others'
            )
        if callable(given):
            return given
        if len(given) != site.stages:
            raise ConfigurationError(f"{len(given)} optimizers for {site.stages} stages; give one each, or one for all")
        return given[site.index]

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Mixed precision, where asked for."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.precision)

    def loss_scale(self) -> float:
        """What a float16 loss is multiplied by, so that small gradients survive."""
        return 2.0**12 if self.precision is torch.float16 else 1.0

    def loss_value(self, output: Any, target: Any, *, frame: int, key: Any) -> torch.Tensor:
        """The loss, checked: a 0-dim tensor with a graph."""
        found = tensors_of(output)
        if self.supervised and found:
            target = _moved(target, found[0].device)
        try:
            value: Any = self.loss(output, target) if self.supervised else self.loss(output)
        except Exception as error:
            raise check_target(output, target, error, frame=frame, key=key) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
            shape = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            shape = "a complex number" if isinstance(value, torch.Tensor) and value.is_complex() else shape
            raise InputError(
                f"frame {frame}: the loss returned {shape}, not one number; reduce it, for instance with .mean()",
                frame=frame,
                key=key,
            )
        if not value.requires_grad:
            raise InputError(
                f"frame {frame}: the loss does not depend on any parameter (was the output detached, or turned "
                "into numbers?)",
                frame=frame,
                key=key,
            )
        return value.reshape(())


def _moved(target: Any, device: torch.device) -> Any:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_inference():
            leaf = leaf.clone()
        return leaf if leaf.device == device else leaf.to(device, non_blocking=True)

    return move(target) if isinstance(target, torch.Tensor) else pytree.tree_map(move, target)
