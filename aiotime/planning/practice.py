"""Practice: a piece of a model that learns from one value again and again, to be timed and weighed.

    value ─▶ leaves ─▶ fn ─▶ output, with its graph        forward
    ones  ─▶ graph ─▶ gradients of leaves and weights      backward
    gradients ─▶ accumulate, guard, clip, optimizer        update

It works on copies of the parameters, with the optimizers' learning rate at zero: weights keep their values however
often it is called. The loss, and what a rule adds to back-propagation (the heads of local losses), are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from aiotime.errors import PlanError
from aiotime.learning.boundary import Boundary, detached, tensors_of
from aiotime.learning.rule import Rule
from aiotime.learning.update import OptimizerFactory, ParamGroups, Updater
from aiotime.learning.weights import Weights, slots_of
from aiotime.planning.piece import Piece


class Practice:
    """Callable ``practice(value) -> output``: forward, backward, update.

    Args:
        fn: value -> value; reads its parameters from ``module``.
        module: whose parameters are replaced by copies; it must not be the user's own.
        rule: says the optimizer, its clipping and accumulation, the precision.
        differentiable: something below learns, so that a gradient for ``value`` is wanted.
        keep_old: each update moves the weights to new memory, as it does where older versions are kept.
        label: what it is called in errors.
        names: name of a parameter in ``module`` -> the model's name for it.
        rebind: called after parameters were replaced.

    Attributes:
        learns: there is something to update.
        active: there is a backward.
        entry: the tensors that came in; outputs: those that went out.
        sources: identities of the parameters that were copied, in the order of ``weights.masters``.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        module: nn.Module,
        rule: Rule,
        *,
        differentiable: bool,
        keep_old: bool = False,
        label: str,
        names: Mapping[str, str] | None = None,
        rebind: Callable[[], Any] | None = None,
    ) -> None:
        self._fn = fn
        self._rule = rule
        self._label = label
        self._keep_old = keep_old
        self._boundary = Boundary(differentiable=differentiable)
        tensor = next(iter(module.parameters()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        slots = slots_of([("", module)], names)
        self.sources = list(dict.fromkeys(id(slot.get()) for slot in slots if slot.get().requires_grad))
        self.weights = Weights(slots, rebind=rebind)
        self.learns = bool(self.weights.masters)
        self.active = self.learns or differentiable
        self.updater = _still(self.weights, rule, label) if self.learns else None
        self.entry: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._working: list[torch.Tensor] = []
        self._seeds: dict[int, torch.Tensor] = {}
        self._grads: list[torch.Tensor | None] = []

    @classmethod
    def of(
        cls,
        piece: Piece,
        rule: Rule,
        *,
        differentiable: bool,
        keep_old: bool = False,
        fn: Callable[[Any], Any] | None = None,
    ) -> Practice:
        """With a piece that nobody else uses, where it was placed; ``fn`` is what it was compiled to."""
        label = piece.layers[0] if len(piece.layers) == 1 else f"{piece.layers[0]} … {piece.layers[-1]}"
        names = {slot: key for key, slot in piece.keys.items()}
        return cls(
            piece if fn is None else fn,
            piece.module,
            rule,
            differentiable=differentiable,
            keep_old=keep_old,
            label=label,
            names=names,
            rebind=piece.module.bind,
        )

    def __call__(self, value: Any) -> Any:
        """One frame, all of it; an update where one is due."""
        output = self.forward(value)
        if self._rule.recompute and self.active:
            self.forward(value)
        self._pull(retain=False)
        if self.updater is not None and self._grads:
            self.updater.add(self._grads)
            if self.updater.due:
                self.updater.step(keep_old=self._keep_old)
        return output

    def forward(self, value: Any) -> Any:
        """The output, cut from its graph; the graph is kept for `backward`."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            given, self.entry = self._boundary.enter(value)
            watched = self._boundary.watch(given)
            with self._rule.autocast(self._device):
                output = self._fn(given)
            self._boundary.learned(watched)
            self.outputs = tensors_of(output)
            self._working = self.weights.working
            return detached(output)

    def backward(self, value: Any) -> None:
        """Through the graph of the newest `forward`, which stays; ``value`` is what a rule that recomputes needs."""
        if self._rule.recompute:
            self.forward(value)
        self._pull(retain=True)

    def update(self, value: Any) -> None:
        """New weights from the gradients of the newest backward; ``value`` is not looked at."""
        if self.updater is not None and self._grads:
            self.updater.add(self._grads)
            self.updater.step(keep_old=self._keep_old)

    def release(self) -> None:
        """Let the graph and the gradients go."""
        self.entry, self.outputs, self._working, self._grads, self._seeds = [], [], [], [], {}

    def _pull(self, *, retain: bool) -> None:
        roots = [(at, output) for at, output in enumerate(self.outputs) if output.requires_grad]
        wanted = [leaf for leaf in self.entry if leaf.requires_grad]
        if not roots or not (wanted or self._working):
            self._grads = []  # the output is a number of things, or does not depend on anything that learns
            return
        try:
            with torch.inference_mode(mode=False):
                grads = torch.autograd.grad(
                    [output for _, output in roots],
                    [*wanted, *self._working],
                    [self._seed(at, output) for at, output in roots],
                    allow_unused=True,
                    retain_graph=retain,
                )
        except RuntimeError as error:
            said = str(error).rstrip(".")
            raise PlanError(
                f"{self._label} cannot be learned from the example: {said}. Where a layer changes in place what "
                "another has kept for its backward, use the form that does not (inplace=False)"
            ) from error
        self._grads = list(grads[len(wanted) :])

    def _seed(self, at: int, output: torch.Tensor) -> torch.Tensor:
        """What stands for the gradient from above; made once, since in a pipeline it comes from there."""
        seed = self._seeds.get(at)
        if seed is None or seed.shape != output.shape or seed.dtype != output.dtype:
            seed = self._seeds[at] = torch.ones_like(output)
        return seed


def frames_per_update(rule: Rule) -> int:
    """Gradients that make one update."""
    return rule.order(0, 1).batch or rule.update_every


def _still(weights: Weights, rule: Rule, label: str) -> Updater:
    """The rule's updater for these weights, with a learning rate of zero; without the scheduler, which would set it."""

    def made(groups: ParamGroups | None) -> Updater:
        return Updater(
            weights,
            _optimizer(rule),
            stage=label,
            param_groups=groups,
            clip_norm=rule.clip_norm,
            every=frames_per_update(rule),
            guard=rule.guard,
        )

    try:
        updater = made(rule.param_groups)
    except Exception:
        if rule.param_groups is None:
            raise
        updater = made(None)  # groups are made for stages; those of a single layer may lack what they look for
    for group in updater.optimizer.param_groups:
        rate = group.get("lr")
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    return updater


def _optimizer(rule: Rule) -> OptimizerFactory:
    """The rule's; where each stage has its own, the one for all others, or else the first."""
    given = rule.optimizer
    if isinstance(given, Mapping):
        return given["*"] if "*" in given else next(iter(given.values()))
    return given if callable(given) else given[0]
