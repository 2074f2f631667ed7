"""Synchronous: M consecutive frames are a mini-batch; one update for it, with the gradient of the whole batch.

    S = 4, M = 4; a backward takes two ticks; "·": idle

    gpipe     stage 0   F0 F1 F2 F3 ·  ·  ·  ·  ·  ·  ·  ·  ·  B0 .. B1 .. B2 .. B3 ..
              stage 3   ·  ·  ·  F0 F1 F2 F3 B0 .. B1 .. B2 .. B3 ..
    1f1b      stage 0   F0 F1 F2 F3 ·  ·  ·  ·  ·  ·  B0 .. ·  B1 .. ·  B2 .. ·  B3 ..
              stage 3   ·  ·  ·  F0 B0 .. F1 B1 .. F2 B2 .. F3 B3 ..
"""

from __future__ import annotations

from typing import Any, Literal

from aiotime.errors import ConfigurationError
from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule

Schedule = Literal["gpipe", "1f1b"]


class Synchronous(Rule):
    """Synchronous micro-batches: the gradient is that of the mini-batch, all of it taken at the same weights.

    With frames x_1 … x_M of one mini-batch:

        θ_k ← θ_k - η (1/M) Σ_m ∂L(x_m)/∂θ_k

    which is plain training on the M frames together, where the loss is a mean and the frames are of one size. The
    mini-batch is the stream's: M frames with targets in a row, whoever sent them. What is left of one when the stream
    ends, idles or is flushed is applied with the mean of its own frames. Between two mini-batches the pipeline runs
    empty; with a backward of twice the time of a forward, S equal stages take 3(M + S - 1) forward times.

    Delay 0. Graphs kept at stage k:

        "gpipe"   M: all forwards, then all backwards      (Huang et al., GPipe, NeurIPS 2019)
        "1f1b"    min(S-k, M), in the same time            (Fan et al., DAPPLE, PPoPP 2021)

    Args:
        micro_batches: M, frames per update.
        schedule: in which order forwards and backwards are taken; the result is the same.
        **settings: those of `aiotime.learning.rule.Rule`, without ``update_every``.
    """

    def __init__(self, *, micro_batches: int, schedule: Schedule = "1f1b", **settings: Any) -> None:
        super().__init__(**settings)
        if micro_batches < 1:
            raise ConfigurationError(f"micro_batches is a number of frames from 1, not {micro_batches}")
        if schedule not in ("gpipe", "1f1b"):
            raise ConfigurationError(f'schedule must be "gpipe" or "1f1b", not {schedule!r}')
        if self.update_every != 1:
            raise ConfigurationError(
                f"Synchronous updates once per micro_batches={micro_batches} frames; leave out "
                f"update_every={self.update_every}, or use micro_batches={micro_batches * self.update_every}"
            )
        self.micro_batches = micro_batches
        self.schedule = schedule

    def order(self, stage: int, stages: int) -> Order:
        """Strict, and after M forwards none until their M backwards are done."""
        size = self.micro_batches
        ahead = size - 1 if self.schedule == "gpipe" else min(stages - 1 - stage, size - 1)
        return Order(ahead, strict=True, batch=size)

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation; while a mini-batch is under way nothing changes, so no weights are kept."""
        learner = StageLearner(site, self)
        learner.stash = False
        return learner
