"""The whole model's gradient norm, for clipping before any stage has updated.

    down, beside the gradients:  ticket.norms[k] = ‖g_k‖²         g_k: stage k's mean gradient of this update
    up, stage by stage:          ticket.updates[k]

‖g‖ = √Σ_k ‖g_k‖² is known once the lowest stage has its own. The stages update one after the other, from the input on,
and the next frame follows them up: stage 0 may run it while stage 1 updates.
"""

from __future__ import annotations

import math

import torch

from aiotime.devices.base import Pending
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket


class WholeNormLearner(StageLearner):
    """Back-propagation whose updates are clipped by the norm of all stages' gradients together.

    Costs one norm (and one look at it from the host) per frame and stage. Works for rules without delay alone: any
    other updates its last stage before the first one has its gradient.
    """

    def __init__(self, site: Site, rule: Rule) -> None:
        super().__init__(site, rule)
        self._newest: Ticket | None = None

    def backward(self, ticket: Ticket, message: Message) -> Message:
        """As ever, but no update; notes the norm of what was gathered."""
        try:
            return super().backward(ticket, message)
        finally:
            self._note(ticket)

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame; the others' gradients still count."""
        super().drop(ticket)
        self._note(ticket)

    def learn(self, ticket: Ticket, kept: Kept, grads: list[torch.Tensor | None]) -> None:
        """Gather only."""
        self.learned += 1
        if self.updater is not None:
            self.updater.add(grads)
            self.scale = ticket.scale

    def _note(self, ticket: Ticket) -> None:
        self._newest = ticket
        if self.updater is not None and ticket.norms:
            ticket.norms[self.site.index] = self.updater.squared_norm(self.scale)

    # ------------------------------------------------------------------ the update

    def offer(self) -> None:
        """The norms travel on the tickets."""

    def agreement(self, ticket: Ticket | None) -> tuple[Pending, Pending]:
        """The lowest stage may update at once: every other has its gradient by then."""
        assert ticket is not None, "nothing is settled before a frame was learned from"
        at = self.site.index
        return ticket.updates[at] if self.site.passes_down else Pending(done=True), ticket.updates[at + 1]

    def finish(self, ticket: Ticket) -> None:
        """Every stage has learned from this frame."""
        if self.updater is not None and self.updater.due:
            self._update()

    def batch_end(self, frames: int) -> None:
        """Every stage has learned from this mini-batch."""
        self._update()

    def discard(self) -> None:
        """A stage below could not update, so this one must not either."""
        if self.updater is not None:
            self.updater.take()

    def _update(self) -> None:
        assert self._newest is not None
        if self.updater is not None:
            norm = math.sqrt(sum(self._newest.norms))
            self.updater.step(keep_old=self.stash and bool(self.kept), scale=self.scale, norm=norm)

    def reset(self) -> None:
        """A new engine begins."""
        super().reset()
        self._newest = None
