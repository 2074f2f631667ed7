"""Delayed: pipelined back-propagation; each frame's own activations, weights of its forward or newer ones.

stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 …
stage 1      F0 F1 F2 B0 F3 B1 F4 B2 …          S = 4, "1f1b": stage k is S-1-k frames ahead
stage 2         F0 F1 B0 F2 B1 F3 B2 …
stage 3            F0 B0 F1 B1 F2 B2 …
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from aiotime.errors import ConfigurationError
from aiotime.learning.boundary import detached, nbytes_of, tensors_of
from aiotime.learning.corrections.contract import Corrected, Correction, Maybe, Tensors, check_all
from aiotime.learning.corrections.prediction import WeightPrediction
from aiotime.learning.double_buffer import DoubleBuffer
from aiotime.learning.heads import HeadFactory, Heads
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.local import Assisted
from aiotime.learning.order import Order, event, lockstep, one_forward_one_backward
from aiotime.learning.recompute import Recomputation
from aiotime.learning.rule import Rule
from aiotime.learning.split import Halves
from aiotime.learning.ticket import Ticket
from aiotime.learning.update import Updater

Which = Literal["stashed", "current", "predicted", "double-buffered"]
Turn = Literal["event", "1f1b", "lockstep"]

_WHICH = ("stashed", "current", "predicted", "double-buffered")
_ORDERS = {"event": event, "1f1b": one_forward_one_backward, "lockstep": lockstep}


class Delayed(Rule):
    """Every stage learns from every frame, up to S-1-k updates late at stage k (Harlap et al., PipeDream, SOSP 2019).

        weights            forward of frame t reads    backward reads           versions held at stage k
        stashed            θ                           that θ                   S-k
        current            θ                           the newest θ             1
        predicted          θ̂ = θ - D·η·v               that θ̂                   S-k+1
        double-buffered    W(j-1) in mini-batch j      that W(j-1)              2     (delay: one update, everywhere)

    Graphs held at stage k: S-k, with ``recompute`` as many inputs instead. "lockstep" doubles what exceeds one.

    Args:
        weights: those that forward and backward see. "predicted": a forward reads what the optimizer's velocity v leads
            to in the D updates until its gradient is there (`corrections.WeightPrediction`). "double-buffered":
            PipeDream-2BW (`double_buffer.DoubleBuffer`); it needs ``update_every`` of at least the number of stages.
        order: "event" runs a backward as soon as it can: delay at most S-1-k, less where the stream leaves time.
            "1f1b" alternates strictly: delay exactly S-1-k and the same bits on every run. "lockstep": 2(S-1-k), what
            synchronous ticks give (Kosson et al. 2020).
        recompute: keep a stage's input instead of its graph, and make the graph again in the backward, with the
            weights that the backward reads.
        split: send the gradient to the stage below before the weight gradients are computed. Finding out which is which
            costs some hundred microseconds per backward, so it is for stages of many milliseconds.
        corrections: for the delay; see `aiotime.learning.corrections`.
        local: factor on the loss of a small head at every stage but the last; its gradient is added to the delayed one
            from above. 0: no heads.
        fresh: take that gradient with the forward, so that it is of the newest frame and stays in its stage; one more
            pass through the stage's graph per frame. False: with the backward of the same frame, in the same pass, and
            it goes on down. None: True, but False with ``recompute``, where a forward has no graph.
        head: how heads are made; see `aiotime.learning.heads.Heads`. None: a default by the shapes.
        seed: of the default heads' first weights.
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(
        self,
        *,
        weights: Which = "stashed",
        order: Turn = "event",
        recompute: bool = False,
        split: bool = False,
        corrections: Sequence[Correction] = (),
        local: float = 0.0,
        fresh: bool | None = None,
        head: HeadFactory | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if weights not in _WHICH:
            raise ConfigurationError(f"weights must be one of {', '.join(map(repr, _WHICH))}, not {weights!r}")
        if order not in _ORDERS:
            raise ConfigurationError(f'order must be "event", "1f1b" or "lockstep", not {order!r}')
        if isinstance(corrections, Correction):
            raise ConfigurationError(f"corrections is a list: corrections=[{type(corrections).__name__}(...)]")
        check_all(corrections, weights)
        if not 0.0 <= local < float("inf"):
            raise ConfigurationError(f"local is a factor on the heads' losses, 0 or more, not {local}")
        if head is not None and not local:
            raise ConfigurationError("head= is for local losses: hand in their factor as well, such as local=1.0")
        if fresh and recompute:
            raise ConfigurationError("fresh=True needs the graph of the forward, which recompute=True does not keep")
        self.local = local
        self.fresh = not recompute if fresh is None else fresh
        self.heads = Heads(head, seed)
        self.which = weights
        self.stashes = weights != "current"
        self.sequence = order
        self.recompute = recompute
        self.split = split
        self.corrections = list(corrections)
        if weights == "predicted":
            self.corrections.append(WeightPrediction())

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """A strict order counts, and so do mini-batches; a frame learned from out of turn would break them."""
        return self.sequence == "event" and self.which != "double-buffered"

    def check(self, stages: int) -> None:
        """Two versions are enough for so many frames in flight only."""
        most = max(stages, self.order(0, stages).ahead)
        if self.which == "double-buffered" and self.update_every < most:
            raise ConfigurationError(
                f'weights="double-buffered" over {stages} stages in the order {self.sequence!r} needs '
                f"update_every={most} or more, not {self.update_every}: with fewer frames per update more than two "
                "versions would be in use"
            )

    def order(self, stage: int, stages: int) -> Order:
        """As the user chose; the first stage has nobody to hurry for."""
        order = _ORDERS[self.sequence](stage, stages, split=self.split and stage > 0)
        for correction in self.corrections:
            order = correction.order(order)
        return order

    def versions(self, stage: int, stages: int) -> int:
        """As in the table above; where a forward reads a guess, every graph has its own."""
        if self.which == "double-buffered":
            return 2
        if not any(correction.changes in ("forward", "backward") for correction in self.corrections):
            return super().versions(stage, stages)
        graphs = self.graphs(stage, stages)
        return 2 if not self.stashes else 1 + graphs if graphs > 1 else 1

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation with a choice of weights."""
        if self.local:
            return AssistedLearner(site, self, share=self.local, fresh=self.fresh, heads=self.heads)
        return DelayedLearner(site, self)


class DelayedLearner(StageLearner):
    """One stage of `Delayed`.

    Args:
        site: the stage.
        rule: the user's settings.
    """

    rule: Delayed

    def __init__(self, site: Site, rule: Delayed) -> None:
        self.corrected = Corrected((), None)  # until there is an optimizer
        super().__init__(site, rule)
        self.stash = rule.which != "current"
        self.buffer = DoubleBuffer(rule.update_every) if rule.which == "double-buffered" else None
        self.recomputation = Recomputation(site) if rule.recompute else None
        self._scratch: Tensors = []  # what graphs read where their weights change under them
        self._owed: tuple[Ticket, Kept, Halves] | None = None  # whose weight gradients come next

    def make_updater(self) -> Updater | None:
        """With what the corrections add to it."""
        updater = super().make_updater()
        self.corrected = Corrected(self.rule.corrections, updater)
        return updater

    # ------------------------------------------------------------------ forward

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """With a graph, or (``recompute``) with a note of how to make it."""
        again = self.recomputation
        if again is None:
            return super().forward(ticket, value)
        if self.top and not ticket.late:  # its backward comes next
            with self.recording(), again.first():
                return super().forward(ticket, value)
        kept = Kept()
        with self.recording(), torch.no_grad(), again.first() as recipe:
            given, _ = self.boundary.enter(value)
            watched = self.boundary.watch(given)
            output = self.compute(ticket, kept, given)
            self.boundary.learned(watched)
        recipe.value = value
        kept.rng = recipe
        if not self.unformed:
            kept.extra = None  # the output goes on; it is not kept
        self.kept[ticket] = kept
        output = detached(output)
        return (output, None) if self.top else output

    def compute(self, ticket: Ticket, kept: Kept, given: Any) -> Any:
        """The stage's function on ``given`` with the weights of the rule; the second time with those of the first."""
        if kept.rng is None:
            kept.weights, kept.version = self.reading(ticket)
        with self._reads(kept.weights), self.rule.autocast(self.site.device):
            return self.site.fn(given)

    def reading(self, ticket: Ticket) -> tuple[Tensors, int]:
        """What the forward of ``ticket`` reads, and which version that is (or comes from)."""
        weights = self.weights
        if self.buffer is not None:
            return self.buffer.read(ticket, weights)
        if not self.corrected.reads_other:
            return weights.working, weights.version
        with torch.no_grad():
            found = self.corrected.forward_weights(ticket.delays[self.site.index] // self.rule.update_every)
            if self.stash:
                return weights.working if found is None else [nn.Parameter(t) for t in found], weights.version
            if len(self._scratch) != len(weights.masters):
                self._scratch = [nn.Parameter(master.detach().clone()) for master in weights.masters]
            _write(self._scratch, weights.masters if found is None else found)
            return self._scratch, weights.version

    def _reads(self, tensors: Tensors) -> AbstractContextManager[Any]:
        return nullcontext() if tensors is self.weights.working else self.weights.using(tensors)

    # ------------------------------------------------------------------ backward

    def backward(self, ticket: Ticket, message: Message) -> Message:
        """Gradients, the update, and the message for the stage below; with ``split`` the message alone."""
        kept = self.kept.pop(ticket)
        self._prepare(ticket, kept)
        if not self.rule.split or ticket.late or not self.site.passes_down or self.updater is None:
            down, grads = self.differentiate(ticket, kept, message)
            self.learn(ticket, kept, grads)
            return down
        roots, seeds = self.roots(ticket, kept, message)
        halves = Halves(roots, seeds, [leaf for leaf in kept.entry if leaf.requires_grad], kept.weights)
        with torch.inference_mode(mode=False):
            found = iter(halves.first())
        self._owed = ticket, kept, halves
        return [next(found) if leaf.requires_grad else None for leaf in kept.entry]

    def finish(self, ticket: Ticket) -> None:
        """The weight gradients that `backward` owes, and the update."""
        owed, self._owed = self._owed, None
        if owed is None:
            return
        _, kept, halves = owed
        with torch.inference_mode(mode=False):
            grads = halves.second()
        self.learn(ticket, kept, grads)

    def _prepare(self, ticket: Ticket, kept: Kept) -> None:
        """Have the frame's graph there, with the weights that its backward is to see."""
        if not self.stash and self.corrected.reads_other:
            with torch.inference_mode(mode=False), torch.no_grad():
                guess = self.corrected.backward_weights(self.weights.version - kept.version)
                values = self.weights.masters if guess is None else guess
                _write(kept.weights, values[: len(kept.weights)])  # a head may have been added since
        elif not self.stash and kept.rng is not None:
            kept.weights = self.weights.working
        if kept.rng is None:
            return
        assert self.recomputation is not None
        with self.recording(), self.recomputation.again(kept.rng):
            given, kept.entry = self.boundary.enter(kept.rng.value)
            output = self.compute(ticket, kept, given)
        kept.outputs = tensors_of(output)
        if self.top:
            kept.extra = output

    def learn(self, ticket: Ticket, kept: Kept, grads: Maybe) -> None:
        """Correct one frame's gradients and take them."""
        if self.buffer is not None:
            self.buffer.gathered(ticket)
        if self.rule.corrections:
            with torch.inference_mode(mode=False), torch.no_grad():
                lag = self.weights.version - kept.version
                grads = self.corrected.gradients(grads, used=kept.weights, delay=lag)
        super().learn(ticket, kept, grads)

    def update(self, scale: float | None = None) -> None:
        """New weights, and what the corrections learn from the move."""
        updater = self.updater
        if updater is None or not updater.gathered:
            return
        keep, old, version = self._keeps_old(), self.weights.working, self.weights.version
        with torch.inference_mode(mode=False):
            before = [p.data if keep else p.data.clone() for p in self.weights.masters if self.corrected.wants_moves]
        try:
            done = updater.step(keep_old=keep, scale=self.scale if scale is None else scale)
        finally:  # a step that raised has changed what it has changed
            self.corrected.lag = 0
            if self.buffer is not None:
                self.buffer.turned(old, version)
        if done and before:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.corrected.updated([p.data - was for p, was in zip(self.weights.masters, before, strict=True)])

    def _keeps_old(self) -> bool:
        """Whether the version that the update replaces is still to be read."""
        if self.buffer is not None:
            return True
        working = self.weights.working
        return self.stash and any(kept.weights and kept.weights[0] is working[0] for kept in self.kept.values())

    def pending_updates(self) -> int:
        """Also what the older version lacks, if that is what the next forward reads."""
        waiting = super().pending_updates()
        return waiting + self.buffer.every if self.buffer is not None and self.buffer.behind else waiting

    # ------------------------------------------------------------------ life and state

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame; a mini-batch goes on without it."""
        super().drop(ticket)
        if self._owed is not None and self._owed[0] is ticket:
            self._owed = None
        if self.buffer is not None:
            self.buffer.lost(ticket)

    def adopt(self) -> None:
        """Learn on from weights that came from outside; how the old ones moved says nothing about them."""
        super().adopt()
        self._scratch = []
        self.corrected.reset()
        if self.buffer is not None:
            self.buffer.adopt()

    def reset(self) -> None:
        """Nothing is in flight."""
        super().reset()
        self._owed = None
        if self.buffer is not None:
            self.buffer.reset()

    def state_dict(self) -> dict[str, Any]:
        """With the corrections' and the older version."""
        state = super().state_dict()
        state["corrections"] = self.corrected.state_dict()
        state["buffer"] = None if self.buffer is None else self.buffer.state_dict(self.weights.version)
        return state

    def about(self) -> dict[str, Any]:
        """With the corrections that have state, and how often the versions change."""
        about = super().about()
        about["corrections"] = [type(correction).__name__ for correction in self.rule.corrections]
        about["frames per version"] = None if self.buffer is None else self.buffer.every
        return about

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, the weights being those of the checkpoint."""
        super().load_state_dict(state)
        with torch.inference_mode(mode=False):
            self.corrected.load_state_dict(state["corrections"], self.site.device)
        if self.buffer is not None and state["buffer"] is not None:
            self.buffer.load_state_dict(state["buffer"], self.weights)

    def kept_nbytes(self) -> int:
        """Bytes of inputs, outputs and weight versions held, and of what the corrections remember."""
        now = list(self.kept.values())
        held: int = sum(nbytes_of(kept.entry) + nbytes_of(kept.outputs) for kept in now)
        held += sum(kept.rng.nbytes() for kept in now if kept.rng is not None)
        own = {master.untyped_storage().data_ptr() for master in self.weights.masters}
        others = [tensor for kept in now for tensor in kept.weights] + self._scratch
        if self.buffer is not None:
            others += self.buffer.old or []
        versions: dict[int, int] = {tensor.untyped_storage().data_ptr(): nbytes_of(tensor) for tensor in others}
        return held + sum(size for at, size in versions.items() if at not in own) + self.corrected.nbytes()


class AssistedLearner(Assisted, DelayedLearner):
    """One stage of `Delayed` with a local loss beside the gradient from above."""


def _write(tensors: Tensors, values: Sequence[torch.Tensor]) -> None:
    """Change what ``tensors`` hold, also for the graphs that read them."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
