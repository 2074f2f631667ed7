"""Interlocking: a stage learns from the loss n-1 stages further up; between local learning and back-propagation.

    n = 2     stage 0    F0 F1 .. B0 F2 .. B1        B0 of stage k wants the loss of stage k+1 alone
              stage 1       F0 r0 F1 r1 B0           r: the gradient of the own loss, on its way to the stage below
              stage 2          F0 r0 F1 r1 B0
              stage 3             F0 B0 F1 B1        the model's loss

What decides which loss passes where is `aiotime.learning.order.interlocking`; the hands are those of `local`.
"""

from __future__ import annotations

from typing import Any

from aiotime.learning.heads import HeadFactory, Heads
from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.local import LocalLearner, Sequence, checked
from aiotime.learning.order import Order, interlocking
from aiotime.learning.rule import Rule
from aiotime.learning.settings import whole_number


class Interlocking(Rule):
    """n-wise interlocking back-propagation (Gomez et al., "Interlocking Backpropagation", JMLR 23, 2022).

    θ_k ← a step on ∂L_m/∂θ_k,   m = min(k + n - 1, S - 1),   L_m = L(h_m(x_{m+1}; φ_m), y),   L_{S-1} the model's loss
    φ_m ← a step on ∂L_m/∂φ_m

    A gradient passes through at most n stages. n = 1 is `aiotime.learning.Local`, n ≥ S back-propagation as `Delayed`
    does it. A stage m has a head where a stage n - 1 below it exists. Each gradient goes down as soon as it is there
    (the paper's threads send a stage's gradients in one list, which waits for the farthest), so a stage waits for the
    n - 1 stages above it and not for the top.

    Delay: at most min(n-1, S-1-k), with the weights of the frame's own forward; exactly that with ``order="1f1b"``.
    Memory: as many graphs and versions of the weights, and one more. Work: up to n passes through a stage's graph.

    Args:
        n: stages that a gradient may pass through, from 1.
        order: "event" runs a backward as soon as it can; "1f1b" alternates strictly: the same bits on every run.
        head: ``(stage index, example of the cut, example of the output) -> nn.Module``, called with what leaves the
            stage and returning what the loss takes; None: a default by the shapes.
        seed: of the default heads' first weights.
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(
        self, n: int, *, order: Sequence = "event", head: HeadFactory | None = None, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        whole_number("n", n, "the number of stages a gradient may pass through,")
        self.n = n
        self.sequence = checked(order)
        self.heads = Heads(head, seed)

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """Where each stage can learn by itself, at any time."""
        return self.sequence == "event" and self.n == 1

    def order(self, stage: int, stages: int) -> Order:
        """A stage is ahead of its backwards by the stages that the gradient passes through."""
        return interlocking(stage, stages, n=self.n, strict=self.sequence == "1f1b")

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation from the loss n-1 stages further up."""
        return LocalLearner(site, self, heads=self.heads)
