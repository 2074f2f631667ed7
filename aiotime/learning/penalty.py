"""Penalty: blocks joined by auxiliary variables λ_k, which a quadratic penalty holds close to what comes from below.

start="output"     F0 F1 … B0 F2 B1 …        as back-propagation: λ_k starts at x_k⁻, p_k comes down, λ_k moves
start="previous"   the same, λ_k starts where the frame before left it: each block learns from a λ of its own
start="aux"        F0 B0 F1 B1 F2 B2 …       on every stage: no block waits for another
"""

from __future__ import annotations

from typing import Any

from aiotime.learning.aux_nets import Aux
from aiotime.learning.auxiliary import AuxiliaryRule, Sequencing, Start
from aiotime.learning.update import OptimizerFactory


class Penalty(AuxiliaryRule):
    """Layer-parallel training with a quadratic penalty (Sun et al. 2020, arXiv 2009.01462; 2021, arXiv 2112.05387).

    min loss + (β/2) Σ_k ‖λ_k - x_k⁻‖², one λ_k for each floating tensor that crosses the boundary below stage k;
    x_k⁻ = f_{k-1}(λ_{k-1}) is of the same shape. For each frame and block k-1, with p_k the gradient that block k
    returns at its entry λ_k:

        λ_k ← λ_k - η(p_k + β(λ_k - x_k⁻))        g = -β(λ_k - x_k⁻), the terminal gradient (last block: the loss's)
        θ_{k-1} ← optimizer(∂f_{k-1}/∂θᵀ g)       p_{k-1} = ∂f_{k-1}/∂λ_{k-1}ᵀ g, sent down

    The order is that of a Gauss-Seidel sweep from the top: λ_k moves before block k-1 learns. A block's learning
    forward uses its newest weights. The constraint is met up to p_k/β.

    Where λ_k starts:

        "output"     at x_k⁻. One forward serves prediction and learning, and with ηβ = 1 and one sweep the terminal
                     gradient is p_k: back-propagation. Delay and memory are those of `Delayed` with stashed weights.
        "previous"   where the newest frame of its scene left it (streams are smooth). Stages above the first run
                     their forward twice, once on x_k and once on λ_k, and keep no graph between: S-1-k inputs.
        "aux"        where a small AuxNet_k predicts it from the raw frame. Every stage learns right after its own
                     forward, delay 0, nothing is stored per sample but for one frame; stages above the first run their
                     forward twice. λ_k is not corrected within the frame; p_k comes down later and teaches the AuxNet
                     to make the corrected λ_k, by which the loss reaches the blocks below.

    A scene cut starts λ_k at x_k⁻ again ("previous"). Predictions are the model's own forward, whatever λ is.

    Args:
        beta: β. Large: close to back-propagation; small: blocks that agree less.
        rate: η; None: 1/β.
        sweeps: steps of a block on one frame before its p goes down; each further one is a forward and an update more.
        start: see above.
        aux: what an AuxNet is: None: one affine map, of pooled channels between pictures; "linear": one affine map of
            the whole frame; ``(raw frame, boundary tensor) -> nn.Module``. They are small, start at zero, live in the
            learner's state and never in the model's.
        aux_optimizer: ``params -> Optimizer`` for them; None: Adam, lr 1e-3.
        order: "event", or "1f1b": the same bits on every run. With AuxNets, "event" takes p_k of an earlier frame when
            it has come; "1f1b" that of the frame before, and waits for it.
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(
        self,
        *,
        beta: float,
        rate: float | None = None,
        sweeps: int = 1,
        aux: Aux = None,
        aux_optimizer: OptimizerFactory | None = None,
        start: Start = "output",
        order: Sequencing = "event",
        **settings: Any,
    ) -> None:
        super().__init__(
            beta=beta,
            rate=rate,
            sweeps=sweeps,
            aux=aux,
            aux_optimizer=aux_optimizer,
            start=start,
            order=order,
            **settings,
        )
