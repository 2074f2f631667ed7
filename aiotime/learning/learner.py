"""StageLearner: one stage's half of a learning rule; here plain back-propagation through the stage's own graph.

    forward(ticket, x)      x ─▶ leaf ─▶ fn ─▶ y          keeps (leaf, y, the weights used) under the ticket
    backward(ticket, g)     ∂y/∂leafᵀ·g ─▶ to the stage below;   ∂y/∂θᵀ·g ─▶ updater ─▶ new θ

Called on the stage's device stream, one job at a time. A rule that differs overrides what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aiotime.errors import ConfigurationError, InputError
from aiotime.learning.boundary import Boundary, detached, nbytes_of, tensors_of
from aiotime.learning.ticket import Ticket
from aiotime.learning.update import Updater
from aiotime.learning.weights import Weights, slots_of

if TYPE_CHECKING:
    from aiotime.learning.rule import Rule

Message = list[torch.Tensor | None] | None  # one gradient per tensor that crossed the boundary


@dataclass
class Site:
    """The stage that a learner is made for.

    Args:
        index: its position; stages: how many there are.
        name: for errors and per-stage settings.
        fn: value -> value; reads its parameters from ``modules`` at every call.
        modules: (prefix, module): names of parameters are prefix + their name in the module.
        rebind: to be called after a parameter slot was changed.
        passes_down: some stage below has something to learn.
        names: name in ``modules`` -> the user's name for it, where they differ.
        identities: name in ``modules`` -> the identity of the user's parameter (moved ones are new objects).
        device: where it runs, as torch says it.
        entry: what comes in, for an example frame; None where that is not known (`Pipeline.from_stages`).
        exit: what goes out for it.
        example: the frame itself.
        final: what leaves the last stage for it.
    """

    index: int
    stages: int
    name: str
    fn: Callable[[Any], Any]
    modules: Sequence[tuple[str, nn.Module]]
    rebind: Callable[[], Any] | None = None
    passes_down: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[str, int] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    entry: Any = None
    exit: Any = None
    example: Any = None
    final: Any = None

    @property
    def top(self) -> bool:
        """The last stage: it has the output and the loss."""
        return self.index == self.stages - 1


class Kept:
    """What one forward leaves for its backward."""

    __slots__ = ("entry", "extra", "loss", "outputs", "rng", "version", "weights")

    def __init__(self) -> None:
        self.entry: list[torch.Tensor] = []  # leaves: the tensors that came in
        self.outputs: list[torch.Tensor] = []  # the tensors that went out, with their graph
        self.weights: list[torch.Tensor] = []  # what the forward read, one per master
        self.version = 0
        self.loss: torch.Tensor | None = None
        self.rng: Any = None
        self.extra: Any = None  # a rule's own


class StageLearner:
    """Back-propagation for one stage; what `Exact` and `Delayed` build on.

    Args:
        site: the stage.
        rule: the user's settings.
    """

    learns = True  # see `Passage`
    unformed = False  # see `aiotime.learning.heads.Headed`

    def __init__(self, site: Site, rule: Rule) -> None:
        self.site = site
        self.rule = rule
        self.top = site.top
        self.batched = rule.order(site.index, site.stages).batch is not None  # mini-batches end by themselves
        self.boundary = Boundary(differentiable=site.passes_down, own=site.device.type != "cpu")
        self.weights = Weights(slots_of(site.modules, site.names), rebind=site.rebind)
        self.updater = self.make_updater()
        self.kept: dict[Ticket, Kept] = {}
        self.stash = True  # a backward sees the weights of its forward
        self.learned = 0  # frames learned from
        self.scale = 1.0  # the losses of the gradients gathered were multiplied by this
        self._anchor: list[torch.Tensor] = []
        self._switches = [m for _, root in site.modules for m in root.modules() if m.training]

    def make_updater(self) -> Updater | None:
        """None where the stage has nothing to learn."""
        return self.rule.updater(self.site, self.weights) if self.weights.masters else None

    # ------------------------------------------------------------------ called by the desk

    def predict(self, value: Any) -> Any:
        """Forward for a frame without target: eval mode, no graph; the newest weights."""
        switches = self._switches
        for module in switches:
            module.training = False
        try:
            with torch.inference_mode():
                output = self.site.fn(value)
                return (output, None) if self.top else output
        finally:
            for module in switches:
                module.training = True

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """Forward with a graph; the last stage returns (output, loss or None)."""
        kept = Kept()
        with self.recording():
            given, kept.entry = self.boundary.enter(value)
            watched = self.boundary.watch(given)
            output = self.compute(ticket, kept, given)
            self.boundary.learned(watched)
            kept.outputs = tensors_of(output)
            if self.top and not ticket.late:
                kept.loss = self.loss_of(ticket, output)
                ticket.loss = kept.loss.detach()  # a ticket may outlive its graph
            elif self.top:
                kept.extra = output
        self.kept[ticket] = kept
        output = detached(output)
        if not self.top:
            return output
        return output, ticket.loss

    def compute(self, ticket: Ticket, kept: Kept, given: Any) -> Any:
        """The stage's function on ``given``; ``kept.weights`` says which weights it read."""
        kept.weights = self.weights.working
        kept.version = self.weights.version
        with self.rule.autocast(self.site.device):
            return self.site.fn(given)

    def backward(self, ticket: Ticket, message: Message) -> Message:
        """Gradients of this stage's graph for ``message``, the update, and the message for the stage below."""
        kept = self.kept.pop(ticket)
        down, grads = self.differentiate(ticket, kept, message)
        self.learn(ticket, kept, grads)
        return down

    def relay(self, ticket: Ticket, loss: int, message: Message) -> Message:
        """The gradient of the loss at stage ``loss``, one stage further down; this stage's weights stay as they are."""
        kept = self.kept[ticket]
        down, _ = self.pull_back(*self.seeded(kept, message), kept.entry, [], retain=True)
        return down

    def finish(self, ticket: Ticket) -> None:
        """Nothing is left to do unless the rule splits its backward."""

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame."""
        self.kept.pop(ticket, None)

    def batch_end(self, frames: int) -> None:
        """Update with what was gathered."""
        self.update()

    def flush(self) -> None:
        """Every frame so far was learned from, and the stream pauses or ends."""

    def pending_updates(self) -> int:
        """Gradients that are not in the weights yet."""
        return self.updater.gathered if self.updater is not None else 0

    # ------------------------------------------------------------------ the parts of a backward

    def differentiate(self, ticket: Ticket, kept: Kept, message: Message) -> tuple[Message, list[torch.Tensor | None]]:
        """(message for the stage below, one gradient per master)."""
        roots, seeds = self.roots(ticket, kept, message)
        return self.pull_back(roots, seeds, kept.entry, kept.weights)

    def roots(
        self, ticket: Ticket, kept: Kept, message: Message
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """What is differentiated, and by which outer gradient."""
        if self.top:
            if kept.loss is None:  # the target came late
                with self.recording():
                    kept.loss = self.loss_of(ticket, kept.extra)
                ticket.loss = kept.loss.detach().cpu()  # read on the loop, which must not wait for a device
            scale = ticket.scale = self.rule.loss_scale()
            return [kept.loss], [None if scale == 1.0 else torch.full_like(kept.loss, scale)]
        return self.seeded(kept, message)

    def seeded(self, kept: Kept, message: Message) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The outputs that ``message`` has gradients for, and those gradients."""
        if message is None:
            return [], []
        pairs = [
            (output, grad)
            for output, grad in zip(kept.outputs, message, strict=True)
            if grad is not None and output.requires_grad
        ]
        return [output for output, _ in pairs], [grad for _, grad in pairs]

    def pull_back(
        self,
        roots: list[torch.Tensor],
        seeds: list[torch.Tensor | None],
        entry: list[torch.Tensor],
        weights: list[torch.Tensor],
        *,
        retain: bool = False,
    ) -> tuple[Message, list[torch.Tensor | None]]:
        """One pass through the stage's graph: gradients of ``roots`` for what came in and for the weights."""
        wanted = [leaf for leaf in entry if leaf.requires_grad]
        if not roots or not (wanted or weights):
            return ([None] * len(entry) if self.site.passes_down else None), [None] * len(weights)
        with torch.inference_mode(mode=False):
            grads = torch.autograd.grad(roots, [*wanted, *weights], seeds, allow_unused=True, retain_graph=retain)
        by_leaf = iter(grads)
        down = [next(by_leaf) if leaf.requires_grad else None for leaf in entry] if self.site.passes_down else None
        if not self.site.passes_down:
            for _ in wanted:
                next(by_leaf)
        return down, list(by_leaf)

    def learn(self, ticket: Ticket, kept: Kept, grads: list[torch.Tensor | None]) -> None:
        """Take one frame's gradients; update when enough are there."""
        self.learned += 1
        updater = self.updater
        if updater is None:
            return
        updater.add(grads)
        self.scale = ticket.scale
        if not self.batched and updater.due:
            self.update(ticket.scale)
        if updater.gathered == 1 and self.site.device.type != "cpu":
            updater.own()  # a gradient may be the message itself, whose memory belongs to another stream

    def update(self, scale: float | None = None) -> None:
        """New weights; ``scale``: that of the gradients gathered, by default the newest one's."""
        if self.updater is not None:
            scale = self.scale if scale is None else scale
            self.updater.step(keep_old=self.stash and bool(self.kept), scale=scale)

    # ------------------------------------------------------------------ helpers of rules

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Autograd on, whatever mode the thread is in."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield

    def loss_of(self, ticket: Ticket, output: Any) -> torch.Tensor:
        """The rule's loss of ``output`` against the ticket's target, checked."""
        return self.rule.loss_value(output, ticket.target, frame=ticket.index, key=ticket.key)

    # ------------------------------------------------------------------ life and state

    def adopt(self) -> None:
        """The stage's weights were replaced from outside (loaded, restored): learn on from those."""
        self.weights.adopt()

    def reset(self) -> None:
        """A new engine begins: nothing is in flight."""
        self.kept.clear()
        if self.site.device.type != "cpu":
            # made on other streams, perhaps those of the engine before: what is replaced must not go back to them, to
            # be used again at once, while work of the new streams that reads it is still queued
            masters = [master.data for master in self.weights.masters]
            self._anchor = [*masters, *tensors_of(self.state_dict())]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights: optimizer and rule state; tensors and plain values."""
        return {"learned": self.learned, "updater": None if self.updater is None else self.updater.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learned = state["learned"]
        if self.updater is not None and state["updater"] is not None:
            self.updater.load_state_dict(state["updater"])

    def about(self) -> dict[str, Any]:
        """What a learner must have in common with this one to go on from its state; plain values."""
        updater = self.updater
        scheduler = None if updater is None else updater.scheduler
        return {
            "learner": type(self).__name__,
            "parameters": {
                name: list(master.shape) for name, master in zip(self.weights.names, self.weights.masters, strict=True)
            },
            "optimizer": None if updater is None else type(updater.optimizer).__name__,
            "parameter groups": []
            if updater is None
            else [len(group["params"]) for group in updater.optimizer.param_groups],
            "scheduler": None if scheduler is None else type(scheduler).__name__,
        }

    def kept_nbytes(self) -> int:
        """Bytes of activations and old weights held for backwards to come (what autograd saves inside not counted)."""
        now = list(self.kept.values())  # the device stream goes on while somebody looks
        held = sum(nbytes_of(kept.entry) + nbytes_of(kept.outputs) for kept in now)
        versions = {kept.version for kept in now} - {self.weights.version}
        return held + len(versions) * self.weights.nbytes()


class Passage(StageLearner):
    """A stage below the first that learns: it only computes, in the mode that the frame asks for.

    It has hands so that its jobs stand in the agenda of its device stream: behind a learning stage's job that waits
    they would wait as well, and that one perhaps for them.
    """

    learns = False

    def make_updater(self) -> Updater | None:
        """There is nothing to learn."""
        return None

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """The module's own mode, no graph."""
        with torch.inference_mode(), self.rule.autocast(self.site.device):
            return self.site.fn(value)


def check_target(output: Any, target: Any, error: Exception, *, frame: int, key: Any) -> InputError:
    """``error``, raised by the loss, as a refusal that shows what was compared."""
    shapes = [", ".join(str(tuple(t.shape)) for t in tensors_of(value)) for value in (output, target)]
    return InputError(
        f"frame {frame} was refused by the loss: output {shapes[0]} against target {shapes[1] or repr(target)}: "
        f"{type(error).__name__}: {error}",
        frame=frame,
        key=key,
    )


def nothing_to_learn(names: Sequence[str]) -> ConfigurationError:
    """No stage has a trainable parameter."""
    return ConfigurationError(
        f"none of the stages {', '.join(names)} has a parameter that requires grad, so there is nothing to learn; "
        "leave the learner out, or unfreeze some layers"
    )
