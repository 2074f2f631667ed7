"""Hands: the learning half of one station: its weights, its optimizer, and when that steps.

    gradients of a batch ──▶ corrected ──▶ summed ──▶ enough of them? ──▶ mean ──▶ step ──▶ next version

Called where the station's device stream runs its jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aiotime.dynamic.batch import Batch, Grads
from aiotime.dynamic.lesson import Lesson
from aiotime.learning.corrections.contract import Corrected
from aiotime.learning.learner import Site
from aiotime.learning.weights import Weights, slots_of


@dataclass(frozen=True, slots=True)
class Counts:
    """What hands have done up to a moment."""

    gradients: int = 0
    updates: int = 0
    skipped: int = 0
    delays: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of(hands: Hands | None) -> Counts:
        """Of ``hands``; None: nothing."""
        if hands is None:
            return Counts()
        updater = hands.updater
        return Counts(
            hands.learned,
            0 if updater is None else updater.updates,
            0 if updater is None else updater.skipped,
            dict(hands.delays),
        )

    def since(self, earlier: Counts) -> Counts:
        """What was done from ``earlier`` on."""
        delays = {delay: times - earlier.delays.get(delay, 0) for delay, times in sorted(self.delays.items())}
        return Counts(
            self.gradients - earlier.gradients,
            self.updates - earlier.updates,
            self.skipped - earlier.skipped,
            {delay: times for delay, times in delays.items() if times},
        )


class Hands:
    """Weights and optimizer of one module.

    Args:
        site: the stage, as rules see it.
        lesson: how it is learned.
    """

    def __init__(self, site: Site, lesson: Lesson) -> None:
        self.site = site
        self.lesson = lesson
        self.weights = Weights(slots_of(site.modules))
        self.updater = lesson.updater(site, self.weights) if self.weights.masters else None
        self.corrected = Corrected(lesson.corrections, self.updater)
        self.delays: Counter[int] = Counter()  # updates between a forward and its backward -> gradients
        self.learned = 0  # gradients, one per use
        self.finished = 0  # instances that are through; counted on the loop
        self.applied = 0  # of those, how many are in the weights; counted where the jobs run
        self.lag = 0.0  # the delay expected of the next forward: a moving average

    def goes_on(self, lesson: Lesson) -> bool:
        """Take ``lesson`` from here on with the same optimizer; False where it needs another."""
        if not self.lesson.continues(lesson):
            return False
        self.lesson = lesson
        if self.updater is not None:
            self.updater.clip_norm, self.updater.guard = lesson.clip_norm, lesson.guard
        return True

    def reading(self) -> AbstractContextManager[Any]:
        """What the next forward reads, as long as it runs."""
        if not self.corrected.reads_other:
            return nullcontext()
        with torch.no_grad():
            found = self.corrected.forward_weights(round(self.lag))
        if found is None:
            return nullcontext()
        return self.weights.using([nn.Parameter(tensor) for tensor in found])

    def take(self, batch: Batch, grads: Grads, count: int, held: Sequence[Batch]) -> None:
        """The gradient of ``count`` uses; ``held``: batches of which a backward is still to come."""
        if self.updater is None:
            return
        lag = self.weights.version - batch.version
        self.delays[lag] += count
        self.lag += (lag - self.lag) / 8
        self.learned += count
        if self.lesson.corrections:
            with torch.no_grad():
                grads = self.corrected.gradients(grads, used=batch.weights, delay=lag)
        self.updater.add(grads)
        self.updater.gathered += count - 1
        if not self.lesson.per_instance and self.updater.gathered >= self.lesson.frequency:
            self.update(self.updater.gathered, held)

    def update(self, count: int, held: Sequence[Batch]) -> None:
        """Step with the sum of what was gathered, divided by ``count``."""
        updater = self.updater
        if updater is None or not updater.gathered:
            return
        grads, _ = updater.take()
        updater.put(grads, count)
        keep = self._keeps(held)
        moves = self.corrected.wants_moves
        before = [p.data if keep else p.data.clone() for p in self.weights.masters] if moves else []
        try:
            done = updater.step(keep_old=keep, scale=self.lesson.loss_scale())
        finally:
            self.corrected.lag = 0
        if done and before:
            with torch.no_grad():
                self.corrected.updated([p.data - was for p, was in zip(self.weights.masters, before, strict=True)])

    def _keeps(self, held: Sequence[Batch]) -> bool:
        """Whether a graph among ``held`` is to see the weights that are about to be replaced."""
        working = self.weights.working
        return self.lesson.stash and any(batch.weights and batch.weights[0] is working[0] for batch in held)

    def blend(self, mean: Sequence[torch.Tensor], since: Sequence[torch.Tensor], held: Sequence[Batch]) -> None:
        """Move by what the mean of all replicas differs from ``since``, our own part of it; later updates stay."""

        def move() -> None:
            with torch.no_grad():
                for master, average, own in zip(self.weights.masters, mean, since, strict=True):
                    target = average.to(master.device)  # to the bit, where nothing came in between
                    master.copy_(torch.where(master == own, target, master + (target - own)))

        keep = self._keeps(held)
        version = self.weights.version
        self.weights.update(move, keep_old=keep)
        self.weights.version = version  # no update: no gradient is late for it
