"""Settings rather than mechanisms: optimizers and hyper-parameters that suit late gradients and single samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.update import OptimizerFactory


def asynchronous_nesterov(lr: float = 3e-4, *, beta1: float = 0.99, **options: Any) -> OptimizerFactory:
    """For ``Delayed(optimizer=...)``: Nesterov's look-ahead makes up for delay (Ajanthan et al. 2025).

    In practice NAdam with a long memory, θ ← θ - η (μ' m̂ + (1-μ) ĝ) / (sqrt(v̂) + ε), β₁ = 0.99, on stashed weights (the
    default of `Delayed`). Memory: Adam's.

    Args:
        lr: η.
        beta1: memory of the gradients' mean.
        **options: others of ``torch.optim.NAdam``; ``betas`` as a whole takes the place of ``beta1``.
    """
    return partial(torch.optim.NAdam, lr=lr, **{"betas": (beta1, 0.999), **options})


def from_batch_recipe(momentum: float, *, lr: float, batch: int) -> tuple[float, float]:
    """(momentum, lr) for single samples from a recipe for batches of ``batch`` (Kosson et al. 2020):

        m = m_N^(1/N)        η = η_N (1 - m) / ((1 - m_N) N)

    The momentum decays as fast per sample, and a sample moves the weights as far in the end.

    Raises:
        ConfigurationError: a number out of its range.
    """
    if not 0 <= momentum < 1:
        raise ConfigurationError(f"momentum must be in [0, 1), not {momentum}")
    if not lr > 0 or batch < 1:
        raise ConfigurationError(f"lr must be positive and batch at least 1, not {lr} and {batch}")
    single: float = momentum ** (1 / batch)
    return single, lr * (1 - single) / ((1 - momentum) * batch)
