"""DoubleBuffer: which of its two newest weight versions a stage's next forward reads (PipeDream-2BW)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aiotime.learning.ticket import Ticket
from aiotime.learning.weights import Weights


class DoubleBuffer:
    """PipeDream-2BW (Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021).

        frame n, from 0, is part of mini-batch j = ⌊n / m⌋; it goes forward and backward with version max(j - 1, 0)
        version j + 1 comes from version j and the mean gradient of mini-batch j:   W(j+1) = W(j) - ν ∇f(W(j-1))

    So every stage is exactly one update late, and two versions are enough: with m ≥ the number of frames in flight,
    mini-batch j - 2 is done when the first frame of mini-batch j begins.

    Args:
        every: m, frames per update.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.begun = 0  # forwards, but those that came to nothing
        self.turns = 0  # updates, those that the guard skipped too
        self.old: list[torch.Tensor] | None = None  # the version before the newest
        self._old_version = 0
        self._open: set[Ticket] = set()  # begun, their gradients not gathered

    @property
    def behind(self) -> bool:
        """Whether the next forward reads the older version."""
        return self.old is not None and max(self.begun // self.every - 1, 0) < self.turns

    def read(self, ticket: Ticket, weights: Weights) -> tuple[list[torch.Tensor], int]:
        """What the forward of ``ticket`` reads, and the version's number."""
        found = (self.old, self._old_version) if self.behind else (weights.working, weights.version)
        self.begun += 1
        self._open.add(ticket)
        assert found[0] is not None
        return found[0], found[1]

    def gathered(self, ticket: Ticket) -> None:
        """Its gradient is in the sum."""
        self._open.discard(ticket)

    def lost(self, ticket: Ticket) -> None:
        """It came to nothing: the mini-batch takes one frame more."""
        if ticket in self._open:
            self._open.discard(ticket)
            self.begun -= 1

    def turned(self, old: list[torch.Tensor], version: int) -> None:
        """An update was made; ``old`` is what it started from."""
        self.turns += 1
        self.old, self._old_version = old, version

    def reset(self) -> None:
        """Nothing is in flight any more."""
        self.begun -= len(self._open)
        self._open.clear()

    def adopt(self) -> None:
        """The weights were replaced from outside: there is no older version of them."""
        self.old = None

    def state_dict(self, version: int) -> dict[str, Any]:
        """For checkpoints; ``version``: number of the newest."""
        old = None if self.old is None else [tensor.detach().clone() for tensor in self.old]
        return {"begun": self.begun, "turns": self.turns, "old": old, "lag": version - self._old_version}

    def load_state_dict(self, state: dict[str, Any], weights: Weights) -> None:
        """Go on from `state_dict`; ``weights`` holds the newest version already."""
        self.begun, self.turns = state["begun"], state["turns"]
        self._old_version = weights.version - state["lag"]
        self.old = None
        if state["old"] is not None:
            with torch.inference_mode(mode=False):
                self.old = [
                    nn.Parameter(old.to(master.device, master.dtype, copy=True))
                    for old, master in zip(state["old"], weights.masters, strict=True)
                ]
