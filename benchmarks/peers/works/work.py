"""What one work is: stages, frames, and what the right answers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

Part = Callable[[Any], Any]  # a function or an nn.Module, one value in, one out
Kind = Literal["functions", "model", "mixed", "learning"]


@dataclass(slots=True)
class Work:
    """One work, the same for every contender.

    Args:
        title: in words, with its sizes.
        kind: "functions": stages in Python that nobody can compile; "model": one module; "mixed": functions around a
            module; "learning": a module that learns from each frame, forward, backward and update.
        whole: the parts as a plain loop calls them, the module uncut.
        stages: the same parts cut by hand for two cores, evenly, for contenders that do not cut by themselves.
        frames: distinct frames, sent in turns; tensors have one row, so that they can be batched along their first dim.
        tolerance: of outputs, relative to the largest value.
        loss: of an output, where the work learns.
        optimizer: of parameters, where the work learns.
    """

    title: str
    kind: Kind
    whole: list[Part]
    stages: list[Part]
    frames: list[Any]
    tolerance: float = 1e-4
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None

    def plain(self, value: Any) -> Any:
        """What the parts make of one frame, called one after the other."""
        for part in self.whole:
            value = part(value)
        return value

    @property
    def model(self) -> nn.Module:
        """The one module of a work that is a model, or that learns."""
        (model,) = self.whole
        assert isinstance(model, nn.Module)
        return model


def halves(model: nn.Sequential, *, layers: int = 1, parts: int = 2) -> list[Part]:
    """The children of ``model`` in ``parts`` equal runs; no cut within ``layers`` children that belong together."""
    children = list(model)
    groups = len(children) // layers
    cuts = [layers * round(part * groups / parts) for part in range(parts)] + [len(children)]
    return [nn.Sequential(*children[start:stop]) for start, stop in pairwise(cuts)]


def difference(one: Any, other: Any) -> float:
    """How far two answers lie apart, relative to the largest value of ``other``; infinite where shapes differ."""
    if isinstance(other, torch.Tensor):
        if not isinstance(one, torch.Tensor) or one.shape != other.shape:
            return float("inf")
        scale = max(float(other.abs().max()), 1e-12)
        return float((one.detach().float() - other.detach().float()).abs().max()) / scale
    if isinstance(other, Sequence) and not isinstance(other, str):
        if not isinstance(one, Sequence) or len(one) != len(other):
            return float("inf")
        return max(map(difference, one, other), default=0.0)
    return float(abs(one - other) / max(abs(other), 1.0))
