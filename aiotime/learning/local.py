"""Local: every stage learns from a loss of its own, and no gradient crosses a stage.

    stage 0    F0 B0 F1 B1 F2 B2 …
    stage 1       F0 B0 F1 B1 F2 B2 …        nobody waits for anybody above
    stage 2          F0 B0 F1 B1 F2 B2 …

The hands below also serve `aiotime.learning.interlocking`, where the loss lies some stages further up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from aiotime.errors import ConfigurationError
from aiotime.learning.heads import Headed, HeadFactory, Heads
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.order import Order, interlocking
from aiotime.learning.rule import Rule
from aiotime.learning.ticket import Ticket

Sequence = Literal["event", "1f1b"]


class Local(Rule):
    """Greedy local learning (Belilovsky et al., "Decoupled Greedy Learning of CNNs", ICML 2020).

    θ_k, φ_k ← a step on ∂L(h_k(x_{k+1}; φ_k), y)/∂(θ_k, φ_k)    x_{k+1} = f_k(x_k; θ_k), x_k without its graph

    with h_k the stage's head (`aiotime.learning.heads`); the last stage has the model's loss and no head. Every stage
    learns from every frame right after its forward: delay 0, one graph per stage, all stages at work at once. A stage
    may thus have learned from a frame that fails further up.

    Args:
        overlapping: stages overlap by one, as in LoCo (Xiong et al., NeurIPS 2020), taken up by Laskin et al. 2020,
            "Parallel Training of Deep Networks with Local Updates": the loss of stage k+1 reaches through stage k+1
            into stage k as well, so that two losses meet in each stage; their gradients are added. Delay at most 1.
        order: as for `aiotime.learning.Delayed`; makes a difference with ``overlapping`` only.
        head: ``(stage index, example of the cut, example of the output) -> nn.Module``, called with what leaves the
            stage and returning what the loss takes; None: a default by the shapes.
        seed: of the default heads' first weights.
        **settings: those of `aiotime.learning.rule.Rule`.
    """

    def __init__(
        self,
        *,
        overlapping: bool = False,
        order: Sequence = "event",
        head: HeadFactory | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.overlapping = overlapping
        self.sequence = checked(order)
        self.heads = Heads(head, seed)

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """Where each stage can learn by itself, at any time."""
        return self.sequence == "event" and not self.overlapping

    def order(self, stage: int, stages: int) -> Order:
        """A backward right after its forward; overlapping: once the stage above has sent its loss's gradient."""
        n = 2 if self.overlapping else 1
        return interlocking(stage, stages, n=n, strict=self.sequence == "1f1b", own=self.overlapping)

    def stage(self, site: Site) -> StageLearner:
        """Back-propagation from the stage's own loss."""
        return LocalLearner(site, self, heads=self.heads, own=self.overlapping)


class LocalLearner(Headed):
    """Learns from the loss ``reach`` stages further up, and sends down the gradients that lower stages want.

    Args:
        site: the stage.
        rule: the user's settings, with the order of every stage.
        heads: how a head is made.
        own: the stage learns from its own loss as well.
    """

    def __init__(self, site: Site, rule: Rule, *, heads: Heads, own: bool = False) -> None:
        order = rule.order(site.index, site.stages)
        self.reach = order.reach
        self.own = own
        self._own: dict[Ticket, list[torch.Tensor | None]] = {}  # gradients of the own loss, until the backward
        # the model's loss travels in the messages of backwards, other losses in relays
        self.hands_on = site.passes_down and rule.order(site.index - 1, site.stages).reach is None
        if site.top and not self.hands_on and not _trainable(site):
            raise ConfigurationError(
                f"the last stage, {site.name!r}, has no parameter that requires grad, so nothing would learn from the "
                "model's own loss: cut further down (balance=[...]), or use Local(overlapping=True) or Interlocking(2)"
            )
        site = replace(site, passes_down=site.passes_down and (self.hands_on or bool(order.relays)))
        wanted = site.index in order.relays or (self.reach == 0 and _trainable(site))
        super().__init__(site, rule, heads=heads, wanted=wanted, waits=not order.relays)

    def relay(self, ticket: Ticket, loss: int, message: Message) -> Message:
        """Begin the gradient of the own loss, or take that of another one stage further down."""
        if loss != self.site.index:
            return super().relay(ticket, loss, message)
        kept = self.kept[ticket]
        value = self.local_loss(ticket, kept)
        first = 0 if self.own else self.body  # the head always learns from its own loss
        seed = self._seed(ticket, value)
        down, grads = self.pull_back([value], [seed], kept.entry, kept.weights[first:], retain=True)
        self._own[ticket] = [*([None] * first), *grads]
        kept.extra = None
        return down

    def differentiate(self, ticket: Ticket, kept: Kept, message: Message) -> tuple[Message, list[torch.Tensor | None]]:
        """(the model's loss's gradient for the stage below, gradients for the weights)."""
        roots, seeds = self.roots(ticket, kept, message)
        down, grads = self.pull_back(roots, seeds, kept.entry if self.hands_on else [], kept.weights)
        grads += [None] * (len(self.weights.masters) - len(grads))
        own = self._own.pop(ticket, None)
        if own is not None:
            grads = added(grads, own)
        return down, grads

    def roots(
        self, ticket: Ticket, kept: Kept, message: Message
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The own loss where that is what this stage learns from, else what the message is about."""
        if self.top or self.reach != 0:
            return super().roots(ticket, kept, message)
        if not self.headed:
            self.unformed = False  # the first frame's way down is over
            return [], []
        value = self.local_loss(ticket, kept)
        return [value], [self._seed(ticket, value)]

    def _seed(self, ticket: Ticket, value: torch.Tensor) -> torch.Tensor | None:
        scale = ticket.scale = self.rule.loss_scale()
        return None if scale == 1.0 else torch.full_like(value, scale)

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame."""
        super().drop(ticket)
        self._own.pop(ticket, None)

    def reset(self) -> None:
        """A new engine begins: nothing is in flight."""
        super().reset()
        self._own.clear()


class Assisted(Headed):
    """The loss of a head, beside the gradient that comes from above; to be put before the class of another rule.

    With ``fresh`` the head's gradient is taken right behind the forward, at the weights of that forward, and goes into
    the next update; so an update joins the newest frame's local gradient with an older frame's from above. Otherwise
    both are those of one frame, in one backward, as late as the gradient from above.

    Args:
        site: the stage.
        rule: the user's settings.
        share: what the head's loss is multiplied by.
        fresh: take the head's gradient with the forward.
        heads: how a head is made.
        **settings: for the next class in line.
    """

    def __init__(
        self, site: Site, rule: Rule, *, share: float, fresh: bool = False, heads: Heads, **settings: Any
    ) -> None:
        self.share = share
        self.fresh = fresh
        self._fresh: list[torch.Tensor | None] | None = None  # of the frames since the last backward, added up
        super().__init__(site, rule, heads=heads, **settings)

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """And, with ``fresh``, the head's gradient; where no example showed its shape, not yet for the first frames."""
        result = super().forward(ticket, value)
        if not self.fresh or not self.headed or ticket.late:
            return result
        kept = self.kept[ticket]
        if self.head is None:
            self.form_early(ticket, kept.extra)
        if self.head is not None:
            try:
                grads = self._head_gradients(ticket, kept)
            except Exception:  # noqa: BLE001 - the backward meets it again and tells; the prediction is not held back
                return result
            kept.extra = None  # `roots` has nothing to add
            self._fresh = grads if self._fresh is None else added(self._fresh, grads)
        return result

    def _head_gradients(self, ticket: Ticket, kept: Kept) -> list[torch.Tensor | None]:
        with self.recording():
            loss = self.local_loss(ticket, kept)
            seed = torch.full_like(loss, self.share * self.rule.loss_scale())
        return self.pull_back([loss], [seed], [], kept.weights, retain=True)[1]

    def learn(self, ticket: Ticket, kept: Kept, grads: list[torch.Tensor | None]) -> None:
        """Together with the local gradients that wait."""
        fresh, self._fresh = self._fresh, None
        super().learn(ticket, kept, grads if fresh is None else added(grads, fresh))

    def flush(self) -> None:
        """A local gradient without a backward behind it belongs to a frame that was lost."""
        self._fresh = None
        super().flush()

    def reset(self) -> None:
        """A new engine begins: nothing is in flight."""
        self._fresh = None
        super().reset()

    def roots(
        self, ticket: Ticket, kept: Kept, message: Message
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """One more root: the own loss."""
        roots, seeds = super().roots(ticket, kept, message)
        if not self.headed or kept.extra is None:
            return roots, seeds
        value = self.local_loss(ticket, kept)
        return [*roots, value], [*seeds, torch.full_like(value, self.share * ticket.scale)]


def added(first: list[torch.Tensor | None], second: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The sum, parameter by parameter; None is nothing. One list may be longer: a head came with the first frame."""
    longest = max(len(first), len(second))
    first, second = [*first, *[None] * (longest - len(first))], [*second, *[None] * (longest - len(second))]
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


def checked(order: Sequence) -> Sequence:
    """``order``, if it is one of those that rules with local losses know."""
    if order not in ("event", "1f1b"):
        raise ConfigurationError(f'order must be "event" or "1f1b", not {order!r}')
    return order


def _trainable(site: Site) -> bool:
    return any(p.requires_grad for _, root in site.modules for p in root.parameters())
