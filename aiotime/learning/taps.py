"""Taps: in a model with long skips, a gradient takes the skip as well, in one tick, whatever lies between.

    stage J ──▶ … ──▶ stage K           a tensor that J made and K uses; the stages between hand it on untouched
    stage J ◀┄┄┄┄┄┄┄┄ stage K           its gradient, one tick later; through the chain it would be K - J ticks

So the gradient that J gets through the tap is of the loss of a frame K - J - 1 newer than the one through the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aiotime.devices.base import Bell, Pending
from aiotime.learning.desk import Desk
from aiotime.learning.learner import Message, Site
from aiotime.learning.ticket import Ticket

Tapped = list[tuple[int, torch.Tensor]]  # (which of the source's outputs, its gradient)


class Taps:
    """What one stage knows of the skips that begin or end at it; found out from the values themselves.

    Args:
        site: the stage.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._ends: dict[int, list[tuple[int, int]]] = {}  # source -> (position at our entry, at its exit)

    def note(self, ticket: Ticket, given: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """After a forward: who made what came in, and so what goes out."""
        at = self.site.index
        origins = ticket.origins
        if not self.site.passes_down:
            origins = [None] * len(given)  # nobody below wants a gradient
        elif origins is None or len(origins) != len(given):
            origins = [(at - 1, position) for position in range(len(given))]
        self._ends = {}
        for position, origin in enumerate(origins):
            if origin is not None and origin[0] < at - 1:
                self._ends.setdefault(origin[0], []).append((position, origin[1]))
        for source in self._ends:
            ticket.relayed(at, source)  # from here on the source knows that something will come
        known = {id(tensor): origin for tensor, origin in zip(given, origins, strict=True)}
        ticket.origins = [known.get(id(tensor), (at, position)) for position, tensor in enumerate(outputs)]

    def send(self, ticket: Ticket, down: Message) -> None:
        """After a backward: what belongs to a tap leaves ``down`` and goes straight to the source."""
        if self._ends and self.site.device.type != "cpu":
            # the source's stream knows nothing of ours
            torch.accelerator.current_stream(self.site.device).synchronize()
        for source, pairs in self._ends.items():
            tapped: Tapped = []
            for position, output in pairs:
                grad = None if down is None else down[position]
                if down is not None and grad is not None:
                    down[position] = None
                    tapped.append((output, grad))
            pending = ticket.relayed(self.site.index, source)
            pending.value, pending.done = tapped, True
            if pending.bell is not None:
                pending.bell.ring()


def joined(message: Message, tapped: Sequence[Tapped]) -> Message:
    """The chain's gradients plus those of the taps.

    Their frames lie between the chain's and the newest one: where these two are of one scene, so are they.
    """
    if message is None or not tapped:
        return message
    total = list(message)
    with torch.inference_mode(mode=False), torch.no_grad():
        for pairs in tapped:
            for output, grad in pairs:
                own = total[output]
                total[output] = grad if own is None else own + grad.to(own.device)
    return total


class TapDesk(Desk):
    """A desk for ``Order(taps=True)``: a backward waits for the taps of its tick."""

    def __init__(self, hands: Any, *args: Any, **settings: Any) -> None:
        super().__init__(hands, *args, **settings)
        self._awaited: Pending | None = None

    def listen(self, bell: Bell) -> None:
        """Listens for a tap as well."""
        super().listen(bell)
        if self._awaited is not None and not self._awaited.done:
            self._awaited.bell = bell

    def _message(self, ticket: Ticket) -> Pending | None:
        up = super()._message(ticket)
        self._awaited = None
        if up is None or self._aborted is not None:
            return up
        tapped = []
        # every stage above has run this frame by now, so all taps that end at it are known
        for stage in sorted(stage for stage, source in list(ticket.relays) if source == self.index):
            newer = stage - self.index - 1
            if newer >= len(self._backward):
                continue  # the pipeline empties: what came through this tap has been used
            pending = self._backward[newer][0].relayed(stage, self.index)
            if not pending.done:
                self._awaited = pending
                return None
            tapped.append(pending.value)
        self.hands.tapped = tapped  # type: ignore[attr-defined]
        return up
