"""Checks of what a user sets on a rule; each error says what would work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aiotime.errors import ConfigurationError

_TARGETS = ("target", "targets", "label", "labels", "truth", "y", "y_true")


def whole_number(name: str, value: Any, what: str, *, least: int = 1) -> int:
    """``value``, if it is an integer of at least ``least``; ``what`` says of what it is the number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} is {what} from {least}, not {value!r}")
    return value


def check_optimizer(given: Any) -> None:
    """A callable, a sequence of them, or a mapping to them."""
    if isinstance(given, torch.optim.Optimizer):
        raise ConfigurationError(
            "optimizer must be a callable params -> Optimizer, since each stage gets its own; "
            f"use functools.partial(torch.optim.{type(given).__name__}, ...)"
        )
    if callable(given):
        found: list[Any] = [given]
    elif isinstance(given, Mapping):
        found = list(given.values())
    elif isinstance(given, Sequence) and not isinstance(given, str):
        found = list(given)
    else:
        found = []
    if not found or not all(map(callable, found)):
        raise ConfigurationError(
            "optimizer must be a callable params -> torch.optim.Optimizer, such as functools.partial(torch.optim.Adam, "
            f'lr=1e-3), or a list of them (one per stage), or a mapping by stage name ("*": all others), not {given!r}'
        )
    for one in found:
        made = getattr(one, "func", one)
        if isinstance(made, type) and issubclass(made, torch.optim.LBFGS):
            raise ConfigurationError(
                "torch.optim.LBFGS evaluates the loss several times per step, and a frame passes once; "
                "use an optimizer that needs no closure"
            )


def check_scheduler(given: Any) -> None:
    """None, or a callable."""
    if given is not None and not callable(given):
        raise ConfigurationError(f"scheduler must be a callable optimizer -> scheduler, not {given!r}")


def made_scheduler(scheduler: Any, *, stage: str) -> Any:
    """``scheduler``, if it can be stepped after each update."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigurationError(
            f"stage {stage!r}: ReduceLROnPlateau needs a metric at each step, which a stage does not have; "
            "use a scheduler that counts steps"
        )
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(f"stage {stage!r}: scheduler(optimizer) returned {scheduler!r}, which has no step()")
    return scheduler


def takes_target(loss: Callable[..., Any]) -> bool:
    """Whether ``loss`` wants a second positional argument, the target; where that cannot be seen, it does.

    An optional second argument counts where its name says so (``target``, ``labels``, …).
    """
    seen = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = list(inspect.signature(seen).parameters.values())
    except (TypeError, ValueError):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2 or (len(positional) >= 2 and positional[1].name.lower() in _TARGETS)
