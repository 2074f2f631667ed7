"""Recomputation: a stage keeps its input alone and makes its graph a second time when the backward comes.

    forward     x ─▶ fn, no graph ─▶ y            kept: x, random state, the buffers that fn changes
    backward    x ─▶ fn, same random state and buffers ─▶ y with its graph ─▶ gradients

Memory falls from a graph to an input per frame in flight; a backward costs one more forward. (Chen et al. 2016;
for pipelines Huang et al., GPipe, 2019.)

What must not happen twice is undone: buffers (BatchNorm's running statistics) and the random generator come out of
the second call as they were before it. PyTorch's random generator is one for all threads, so stages that draw from
it (dropout) hold one lock of the process while they do: their forwards run one after the other. Whether a
stage draws, and which buffers it changes, is found out with its first frame. Two things are not covered: other threads
that draw meanwhile (a data loader's numbers come from elsewhere), and Python's ``random``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from aiotime.learning.boundary import nbytes_of
from aiotime.learning.learner import Site

_ONE_AT_A_TIME = threading.RLock()  # whoever draws from the process's random generators while they may be set back

Buffers = list[tuple[nn.Module, str, torch.Tensor]]


class Recipe:
    """What one forward leaves so that it can be repeated."""

    __slots__ = ("buffers", "random", "value")

    def __init__(self) -> None:
        self.value: Any = None  # what came in
        self.random: list[torch.Tensor] | None = None
        self.buffers: Buffers = []

    def nbytes(self) -> int:
        """Bytes held."""
        return nbytes_of(self.value) + nbytes_of([tensor for _, _, tensor in self.buffers])


class Recomputation:
    """Runs a stage's function twice with the same result.

    Args:
        site: the stage.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._modules = [module for _, root in site.modules for module in root.modules()]
        self.draws: bool | None = None  # random numbers; None: not known yet
        self._moving: list[nn.Module] | None = None  # modules whose buffers a forward changes

    @contextmanager
    def first(self) -> Iterator[Recipe]:
        """Around the forward: notes what `again` needs."""
        recipe = Recipe()
        modules = self._modules if self._moving is None else self._moving
        recipe.buffers = [
            (module, name, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        with self._alone():
            if self.draws is not False:
                recipe.random = _random_state(self._site.device)
            yield recipe
            if self.draws is None:
                assert recipe.random is not None
                self.draws = any(
                    not torch.equal(before, after)
                    for before, after in zip(recipe.random, _random_state(self._site.device), strict=True)
                )
        if not self.draws:
            recipe.random = None
        if self._moving is None:
            moved = {module for module, name, before in recipe.buffers if not _same(module._buffers[name], before)}
            self._moving = [module for module in self._modules if module in moved]
            recipe.buffers = [found for found in recipe.buffers if found[0] in moved]

    @contextmanager
    def again(self, recipe: Recipe) -> Iterator[None]:
        """Around the second run: the same random numbers and buffers, and no trace of it afterwards."""
        with self._alone():
            now = None if recipe.random is None else _random_state(self._site.device)
            if recipe.random is not None:
                _set_random_state(self._site.device, recipe.random)
            newest = [(module, name, module._buffers[name]) for module, name, _ in recipe.buffers]
            self._put(recipe.buffers)
            try:
                yield
            finally:
                self._put(newest)
                if now is not None:
                    _set_random_state(self._site.device, now)

    def _put(self, buffers: Any) -> None:
        for module, name, tensor in buffers:
            module._buffers[name] = tensor
        if buffers and self._site.rebind is not None:
            self._site.rebind()

    def _alone(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.draws is False else _ONE_AT_A_TIME


def _same(now: torch.Tensor | None, before: torch.Tensor) -> bool:
    return now is not None and now.shape == before.shape and torch.equal(now, before)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Of the host's generator and, where it is another one, the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
