"""Sideways: the lock-step rule of PARTIME: the newest activation meets the gradient of an older frame.

tick        0    1    2    3    4    5    6          S = 3; "3|1": activation of frame 3, gradient of frame 1
stage 0     0    1    2    3   4|0  5|1  6|2         mismatch 4 = 2(S-1-k)
stage 1          0    1   2|0  3|1  4|2  5|3                  2
stage 2              0|0  1|1  2|2  3|3  4|4                  0
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

from aiotime.errors import InputError
from aiotime.learning.boundary import tensors_of
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.order import Order, lockstep
from aiotime.learning.rule import Rule
from aiotime.learning.taps import Tapped, Taps, joined
from aiotime.learning.ticket import Ticket
from aiotime.learning.update import Updater
from aiotime.learning.weights import Weights


class Sideways(Rule):
    """Each stage pushes the gradient that has just arrived through the Jacobian of its newest forward.

    At one tick, stage k takes frame f and the gradient g of the loss of frame f - 2(S-1-k)
    (Malinowski et al., "Sideways: Depth-Parallel Training of Video Models", CVPR 2020; as the published source of
    PARTIME performs it):

        z = f_k(x_f; θ_k)      θ_k ← θ_k - η (∂z/∂θ_k)ᵀ g      to the stage below: (∂z/∂x_f)ᵀ g

    Nothing is stored but one graph per stage. It learns where neighbouring frames are alike, and hardly anywhere else;
    `Delayed` costs more memory and has no such mismatch. Beyond the source:

    - while the pipeline fills, a stage waits for its first gradient; it never learns from what is not data;
    - when the stream ends (or is flushed, or idles), every gradient under way is used once: the stage runs its newest
      input again with the weights it has by then, as a further tick would;
    - a gradient of a loss from before a scene cut (``Sample(cut=True)``) is not pushed through an activation from after
      it: it ends there, and is counted in `straddled`.

    Delay 2(S-1-k) updates at stage k; memory: one graph per stage. All frames must have one shape.

    A model with long skips, cut into stages, hands the skipping tensors on from stage to stage. With ``taps`` their
    gradients go back the short way, in one tick, as in Skip-Sideways (Malinowski et al., "Gradient Forward-Propagation
    for Large-Scale Temporal Video Modelling", CVPR 2021). There the activations take the skip in one tick too, so that
    a unit sees features of several frames at once. That is another function than the model's, and its value for a frame
    would depend on frames that come later; here each frame's output stays the model's own, and a module that wants
    features of earlier frames keeps them itself.

    Args:
        taps: gradients of tensors that stages only hand on go straight to the stage that made them. Those that arrive
            before a stage's first gradient through the chain are not used.
        per_clip: gather pseudo-gradients and apply their mean once per clip, when the first frame of the next scene
            reaches the stage (and at the end), as the authors of Sideways do; with ``update_every=n`` also after n.
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(self, *, taps: bool = False, per_clip: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.taps = taps
        self.per_clip = per_clip
        self._learners: WeakSet[SidewaysLearner] = WeakSet()

    @property
    def straddled(self) -> int:
        """Gradients not used because a scene cut lay between them and the newest activation; all stages together."""
        return sum(learner.straddled for learner in self._learners)

    def order(self, stage: int, stages: int) -> Order:
        """2(S-1-k) forwards first, then one forward, one backward."""
        return dataclasses.replace(lockstep(stage, stages), taps=self.taps)

    stashes = False

    def graphs(self, stage: int, stages: int) -> int:
        """The newest frame's alone."""
        return 1

    def stage(self, site: Site) -> StageLearner:
        """Hands that keep one graph."""
        learner = SidewaysLearner(site, self)
        self._learners.add(learner)
        return learner

    def updater(self, site: Site, weights: Weights) -> Updater:
        """One update per frame, per ``update_every`` frames, or per clip."""
        updater = super().updater(site, weights)
        if self.per_clip and self.update_every == 1:
            updater.every = sys.maxsize
        return updater


class SidewaysLearner(StageLearner):
    """Keeps the newest forward alone.

    Attributes:
        straddled: gradients that ended here because their loss was from before a scene cut.
        reruns: backwards that had to run the newest input again (only while the pipeline empties).
    """

    def __init__(self, site: Site, rule: Sideways) -> None:
        super().__init__(site, rule)
        self.stash = False
        self.straddled = 0
        self.reruns = 0
        self.tapped: list[Tapped] = []  # what came through taps for the backward that is next
        self._taps = Taps(site) if rule.taps else None
        self._given: list[torch.Tensor] = []
        self._per_clip = rule.per_clip
        self._newest: Ticket | None = None

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """Forward with the present weights; the graph before goes first, so that there is never a second one."""
        if self._per_clip and self._newest is not None and ticket.scene != self._newest.scene:
            self.update()
        for kept in self.kept.values():
            _release(kept)
        output = super().forward(ticket, value)
        kept = self.kept[ticket]
        kept.extra = value
        self.kept = {ticket: kept}
        self._newest = ticket
        if self._taps is not None:
            self._taps.note(ticket, self._given, kept.outputs)
        return output

    def compute(self, ticket: Ticket, kept: Kept, given: Any) -> Any:
        """As ever; what comes out as it came in is only handed on."""
        if self._taps is not None:
            self._given = tensors_of(given)
        return super().compute(ticket, kept, given)

    def backward(self, ticket: Ticket, message: Message) -> Message:
        """The gradient of ``ticket``'s loss through the newest forward; the update."""
        down: Message = None
        try:
            down = self._backward(ticket, message)
        finally:
            if self._taps is not None:
                self._taps.send(ticket, down)
        return down

    def _backward(self, ticket: Ticket, message: Message) -> Message:
        newest = self._newest
        assert newest is not None, "a gradient comes after its own forward"
        kept = self.kept[newest]
        if newest.scene != ticket.scene:
            self.straddled += 1
            return [None] * len(kept.entry) if self.site.passes_down else None
        with self._rerun(newest, kept) if not kept.outputs else nullcontext():
            message = joined(message, self.tapped)
            if message is not None:
                self._check_fit(ticket, newest, kept, message)
            down, grads = self.differentiate(ticket, kept, message)
        _release(kept)
        self.learn(ticket, kept, grads)
        return down

    def flush(self) -> None:
        """The clip ends here as far as anybody knows."""
        if self._per_clip:
            self.update()

    def drop(self, ticket: Ticket) -> None:
        """Nothing was kept for it: the newest forward serves whichever gradient comes next."""
        if self._taps is not None:
            self._taps.send(ticket, None)

    @contextmanager
    def _rerun(self, newest: Ticket, kept: Kept) -> Iterator[None]:
        """No further frame came: a further tick on the same input, without its effect on buffers (running means)."""
        self.reruns += 1
        buffers = [buffer for _, root in self.site.modules for buffer in root.buffers()]
        before = [buffer.detach().clone() for buffer in buffers]
        with self.recording():
            given, kept.entry = self.boundary.enter(kept.extra)
            kept.outputs = tensors_of(self.compute(newest, kept, given))
        try:
            yield
        finally:  # not earlier: the graph may have saved them
            with torch.inference_mode(mode=False), torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)

    def _check_fit(self, ticket: Ticket, newest: Ticket, kept: Kept, message: list[torch.Tensor | None]) -> None:
        ours = [tuple(output.shape) for output in kept.outputs]
        fits = len(message) == len(ours) and all(
            grad is None or tuple(grad.shape) == shape for grad, shape in zip(message, ours, strict=True)
        )
        if not fits:
            theirs = [None if grad is None else tuple(grad.shape) for grad in message]
            raise InputError(
                f"Sideways pushes the gradient of frame {ticket.index} through the activation of frame {newest.index}, "
                f"but the gradient has shape {theirs} and the activation {ours}: all frames must have one shape. "
                "Crop or pad them, or use Delayed, which keeps each frame's own activation",
                frame=ticket.index,
                key=ticket.key,
            )

    def reset(self) -> None:
        """A new engine begins: nothing is in flight."""
        super().reset()
        self._newest = None

    def state_dict(self) -> dict[str, Any]:
        """With the count of gradients that straddled a cut."""
        return {**super().state_dict(), "straddled": self.straddled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
        self.straddled = state["straddled"]


def _release(kept: Kept) -> None:
    kept.outputs, kept.loss, kept.weights = [], None, []
