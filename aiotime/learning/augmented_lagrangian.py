"""AugmentedLagrangian: `Penalty` with multipliers κ_k, which take over what the penalty alone never quite reaches."""

from __future__ import annotations

import math
from typing import Any

from aiotime.errors import ConfigurationError
from aiotime.learning.auxiliary import AuxiliaryRule


class AugmentedLagrangian(AuxiliaryRule):
    """Layer-parallel training with multipliers (Sun et al. 2020, arXiv 2009.01462; 2021, arXiv 2112.05387).

    min loss + Σ_k κ_kᵀ(λ_k - x_k⁻) + (β/2)‖λ_k - x_k⁻‖²; per frame and block k-1, in this order:

        λ_k ← λ_k - η(p_k + κ_k + β(λ_k - x_k⁻))
        g = -(κ_k + β(λ_k - x_k⁻))                 terminal gradient of block k-1 (last block: the loss's)
        κ_k ← κ_k + μβ(λ_k - x_k⁻)

    At rest λ_k = x_k⁻ and κ_k = -p_k for any β, where `Penalty` leaves a gap p_k/β. κ_k has the shape of λ_k and is
    carried from frame to frame; a scene cut, or a frame of another shape, starts it at zero. With ``start="output"``
    and ηβ = 1 the terminal gradient is p_k all the same; with ηβ < 1 and μ = 1 it is a running mean of p_k over the
    frames, g_t = ηβ p_k + (1 - ηβ) g_{t-1}. With AuxNets κ_k sums up what they predict wrongly, so that
    a small μ is needed for it to stay bounded.

    Args:
        beta: β.
        dual_rate: μ, in (0, 1]; None: 1, with AuxNets 0.01.
        **settings: ``rate``, ``sweeps``, ``start``, ``aux``, ``aux_optimizer`` and ``order`` of `Penalty`, and those of
            `aiotime.learning.rule.Rule`.
    """

    def __init__(self, *, beta: float, dual_rate: float | None = None, **settings: Any) -> None:
        super().__init__(beta=beta, **settings)
        if dual_rate is None:
            dual_rate = 0.01 if self.start == "aux" else 1.0
        if not (0 < dual_rate <= 1 and math.isfinite(dual_rate)):
            raise ConfigurationError(
                f"dual_rate, the share of a step that the multipliers take, is in (0, 1], not {dual_rate}"
            )
        self.dual_rate = dual_rate
