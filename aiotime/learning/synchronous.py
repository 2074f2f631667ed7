"""Synchronous: M consecutive frames are a mini-batch; one update for it, with the gradient of the whole batch.

S = 4, M = 4; a backward takes two ticks; "·": idle

gpipe     stage 0   F0 F1 F2 F3 ·  ·  ·  ·  ·  ·  ·  ·  ·  B0 .. B1 .. B2 .. B3 ..
          stage 3   ·  ·  ·  F0 F1 F2 F3 B0 .. B1 .. B2 .. B3 ..
1f1b      stage 0   F0 F1 F2 F3 ·  ·  ·  ·  ·  ·  B0 .. ·  B1 .. ·  B2 .. ·  B3 ..
          stage 3   ·  ·  ·  F0 B0 .. F1 B1 .. F2 B2 .. F3 B3 ..
chimera   device 0  F0 F2 ·  F1 B1 .. F3 B3 .. ·  B0 .. ·  ·  B2 ..    stage 0 (frames 0, 2), 3 (frames 1, 3)
          device 3  F1 F3 ·  F0 B0 .. F2 B2 .. ·  B1 .. ·  ·  B3 ..    stage 3 (frames 0, 2), 0 (frames 1, 3)
"""

from __future__ import annotations

from typing import Any, Literal

from aiotime.errors import ConfigurationError
from aiotime.learning.chimera import DOWN, UP, Meeting, ReplicaLearner
from aiotime.learning.learner import Site, StageLearner
from aiotime.learning.norm import WholeNormLearner
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.learning.settings import whole_number

Schedule = Literal["gpipe", "1f1b", "chimera"]


class Synchronous(Rule):
    """Synchronous micro-batches: the gradient is that of the mini-batch, all of it taken at the same weights.

    With frames x_1 … x_M of one mini-batch:

        θ_k ← θ_k - η (1/M) Σ_m ∂L(x_m)/∂θ_k

    which is plain training on the M frames together, where the loss is a mean and the frames are of one size. The
    mini-batch is the stream's: M frames with targets in a row, whoever sent them. What is left of one when the stream
    ends, idles or is flushed is applied with the mean of its own frames. Between two mini-batches the pipeline runs
    empty; with a backward of twice the time of a forward, S equal stages take 3(M + S - 1) forward times.

    Delay 0. Graphs kept at stage k:

        "gpipe"    M: all forwards, then all backwards      (Huang et al., GPipe, NeurIPS 2019)
        "1f1b"     min(S-k, M), in the same time            (Fan et al., DAPPLE, PPoPP 2021)
        "chimera"  min(S-k, M/2) in each of two replicas    (Li and Hoefler, Chimera, SC 2021)

    Chimera runs two pipelines over the same devices, in opposite directions, each with half of the frames: device p
    holds stage p and a replica of stage S-1-p. The weights and optimizer state are there twice; for M = S the
    mini-batch takes 3M + 2(S - 2) in place of 3(M + S - 1). Needs even S and M. Modules with running statistics (batch
    norm) gather them in each replica from its own frames; `Pipeline.state_dict` has those of the first. A function that
    is no module is called by both replicas, on two threads.

    Args:
        micro_batches: M, frames per update.
        schedule: in which order forwards and backwards are taken; the result is the same.
        **settings: those of `aiotime.learning.rule.Rule`, without ``update_every``.
    """

    def __init__(self, *, micro_batches: int, schedule: Schedule = "1f1b", **settings: Any) -> None:
        super().__init__(**settings)
        whole_number("micro_batches", micro_batches, "a number of frames")
        if schedule not in ("gpipe", "1f1b", "chimera"):
            raise ConfigurationError(f'schedule must be "gpipe", "1f1b" or "chimera", not {schedule!r}')
        if schedule == "chimera" and micro_batches % 2:
            raise ConfigurationError(
                f"Chimera sends half of a mini-batch each way: micro_batches must be even, not {micro_batches}"
            )
        if schedule == "chimera" and self.clip == "global":
            raise ConfigurationError(
                'schedule="chimera" cannot clip by the global norm: the two replicas of a stage update as soon as '
                'their halves have met. Use clip="stage", or schedule="1f1b"'
            )
        if self.update_every != 1:
            raise ConfigurationError(
                f"Synchronous updates once per micro_batches={micro_batches} frames; leave out "
                f"update_every={self.update_every}, or use micro_batches={micro_batches * self.update_every}"
            )
        self.micro_batches = micro_batches
        self.schedule = schedule

    without_delay = True

    def order(self, stage: int, stages: int) -> Order:
        """Strict, and after M forwards none until their M backwards are done."""
        size = self.micro_batches
        if self.schedule == "chimera":
            size //= 2  # each way
            return Order(min(stages - 1 - stage, size - 1), strict=True, batch=size, meet=True)
        ahead = size - 1 if self.schedule == "gpipe" else min(stages - 1 - stage, size - 1)
        return Order(ahead, strict=True, batch=size, meet=self.clip == "global")

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation; while a mini-batch is under way nothing changes, so no weights are kept."""
        if self.schedule == "chimera":
            return ReplicaLearner(site, self, Meeting(), DOWN)
        learner = WholeNormLearner(site, self) if self.clip == "global" else StageLearner(site, self)
        learner.stash = False
        return learner

    def replica(self, site: Site, of: StageLearner) -> ReplicaLearner:
        """The hands of the other replica of a stage."""
        assert isinstance(of, ReplicaLearner)
        return ReplicaLearner(site, self, of.meeting, UP)

    def check(self, stages: int) -> None:
        """Chimera pairs stage p with stage S-1-p."""
        if self.schedule == "chimera" and stages % 2:
            raise ConfigurationError(
                f"Chimera needs an even number of stages, since two share each device; this pipeline has {stages}. "
                'Name an even number of devices and balance="even" (or a list), or use schedule="1f1b"'
            )
