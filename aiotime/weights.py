"""New weights on their way through the stages: a control frame between two frames, and its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import torch

from aiotime.errors import BrokenError, ClosedError
from aiotime.frame import Frame

LoadStage = Callable[[int, Mapping[str, torch.Tensor]], None]


class Swap:
    """Replaces the weights of each stage when its turn comes.

    Args:
        load_stage: puts the stage's part of the state in place; on the stage's device stream.
        state: the new weights under the pipeline's keys.
        stages: how many there are.
    """

    def __init__(self, load_stage: LoadStage, state: Mapping[str, torch.Tensor], *, stages: int) -> None:
        self._load_stage = load_stage
        self._state = state
        self._to_do = set(range(stages))
        self.done: asyncio.Future[None] | None = None  # while running: every stage has them

    def apply(self, stage: int) -> None:
        """Load one stage; weights stay ordinary tensors, fit for learning."""
        with torch.inference_mode(mode=False):
            self._load_stage(stage, self._state)
        self._to_do.discard(stage)

    def settled(self, frame: Frame) -> None:
        """All stages were passed, one of them failed, or the pipeline was closed under way."""
        if isinstance(frame.error, ClosedError | BrokenError):
            for stage in sorted(self._to_do):  # no frame will be computed any more: leave no half-new weights behind
                self.apply(stage)
        if self.done is not None and not self.done.done():
            if frame.error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(frame.error)
