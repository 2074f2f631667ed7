"""Ticket: what one frame of a learning pipeline carries beside its value, from its first forward to its last update.

    forward:   stage 0 ──▶ stage 1 ──▶ … ──▶ stage S-1 ──▶ output, loss
    backward:  grads[0] ◀── grads[1] ◀── … ◀── grads[S]          each a pending message, made before any of them runs

Because the way back is known when a frame enters, no event loop is needed to send a gradient: the device stream
of stage k waits for ``grads[k + 1]`` and settles ``grads[k]``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from aiotime.devices.base import Pending
from aiotime.frame import NOBODY, Frame


class Ticket:
    """One frame's way through learning.

    Attributes:
        learn: it has (or will have) something to be learned from; otherwise it is predicted only.
        target: for the loss; meaningless where ``learn`` is False.
        late: its target comes by `Pipeline.feedback`; until then its graphs are kept.
        place: position in its mini-batch, where that decides which replica of a stage takes it; -1: not yet decided.
        origins: which stage made each tensor that the newest stage put out, and its position there, where it matters.
        norms, updates: per stage, where clipping is global; see `aiotime.learning.norm`.
        scene: number of scene cuts before it; gradients do not cross a cut.
        raw: the frame as it entered, where the rule asked for it.
        delays: per stage: updates of earlier frames that its weights lacked when it passed.
        loss: 0-dim tensor, once the last stage has it.
        grads: per stage boundary: the message that travels down through it.
        final: the model's output for a frame whose shapes are not known before it comes: meta tensors.
        shadow: the frame as backward jobs name it; nobody can cancel it.
        owner: whoever is told when learning from it fails.
    """

    __slots__ = (
        "delays",
        "expired",
        "final",
        "grads",
        "index",
        "key",
        "late",
        "learn",
        "loss",
        "norms",
        "origins",
        "owner",
        "place",
        "raw",
        "relays",
        "scale",
        "scene",
        "shadow",
        "target",
        "updates",
    )

    def __init__(
        self, index: int, stages: int, *, key: Hashable = None, learn: bool, target: Any = None, late: bool = False
    ) -> None:
        self.index = index
        self.key = key
        self.learn = learn
        self.target = target
        self.late = late
        self.expired = False  # its target came too late: what was kept for it is gone
        self.scene = 0
        self.raw: Any = None
        self.delays = [0] * stages
        self.loss: Any = None
        self.scale = 1.0  # the loss was multiplied by this before it was differentiated (float16)
        self.owner: Any = None
        self.grads: list[Pending] = [Pending() for _ in range(stages + 1)] if learn else []
        self.final: Any = None
        self.norms: list[float] = []
        self.origins: list[tuple[int, int] | None] | None = None
        self.place = -1
        self.updates: list[Pending] = []
        self.relays: dict[tuple[int, int], Pending] = {}
        self.shadow = Frame(NOBODY, index, Pending(done=True), 0.0) if learn else None

    def relayed(self, stage: int, loss: int) -> Pending:
        """What ``stage`` sends down of the gradient of the loss at stage ``loss``; any thread, the same each time."""
        return self.relays.setdefault((stage, loss), Pending())
