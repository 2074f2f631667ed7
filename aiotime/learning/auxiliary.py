"""Auxiliary variables: blocks that learn from inputs of their own; what `Penalty` and `AugmentedLagrangian` share.

    min  loss(f_{S-1}(λ_{S-1})) + Σ_k [ κ_kᵀ(λ_k - x_k⁻) + (β/2)‖λ_k - x_k⁻‖² ],    x_k⁻ = f_{k-1}(λ_{k-1})

    up      stage k-1 ── x_k, λ_k ──▶ stage k        x_k: the model's own forward, which is what the user sees
    down    stage k-1 ◀──── p_k ───── stage k        p_k: gradient of block k's terms at its entry λ_k

Stage k-1 owns λ_k and κ_k, those of the boundary above it (`aiotime.learning.joint`). It has x_k⁻ itself, so its own
weights need nothing but λ_k; only the correction of λ_k needs p_k. Were they stage k's, stage k-1 would wait for λ_k
to come down before it could learn anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.learning.aux_nets import Aux, AuxNets
from aiotime.learning.boundary import nbytes_of, tensors_of
from aiotime.learning.desk import Echo
from aiotime.learning.joint import Joint, Tensors, has_gradient, plain, wide
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.order import Order, event, one_forward_one_backward
from aiotime.learning.rule import Rule
from aiotime.learning.settings import whole_number
from aiotime.learning.ticket import Ticket
from aiotime.learning.update import OptimizerFactory

Start = Literal["output", "previous", "aux"]
Sequencing = Literal["event", "1f1b"]

ORDERS = {"event": event, "1f1b": one_forward_one_backward}


class AuxiliaryRule(Rule):
    """Settings of rules that split the network at the stage boundaries; see `Penalty` for what they mean."""

    dual_rate = 0.0  # of κ; 0: there is none

    def __init__(
        self,
        *,
        beta: float,
        rate: float | None = None,
        sweeps: int = 1,
        start: Start = "output",
        aux: Aux = None,
        aux_optimizer: OptimizerFactory | None = None,
        order: Sequencing = "event",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not (beta > 0 and math.isfinite(beta)):
            raise ConfigurationError(f"beta, the weight of the penalty, must be positive, not {beta}")
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ConfigurationError(f"rate, the step of the auxiliary variables, must be positive, not {rate}")
        whole_number("sweeps", sweeps, "a number of steps per frame")
        if start not in ("output", "previous", "aux"):
            raise ConfigurationError(f'start must be "output", "previous" or "aux", not {start!r}')
        if not (aux is None or aux == "linear" or callable(aux)):
            raise ConfigurationError(f'aux must be None, "linear" or a callable (raw, boundary) -> Module, not {aux!r}')
        if start != "aux" and not (aux is None and aux_optimizer is None):
            raise ConfigurationError(f'aux and aux_optimizer are for start="aux"; start is {start!r}')
        if order not in ORDERS:
            raise ConfigurationError(f'order must be "event" or "1f1b", not {order!r}')
        if start == "aux" and self.precision is torch.float16:
            raise ConfigurationError(
                'start="aux" learns before the scale of a float16 loss is known; use precision=torch.bfloat16'
            )
        self.beta = beta
        self.rate = 1.0 / beta if rate is None else rate
        self.sweeps = sweeps
        self.start = start
        self.aux: Aux = aux
        self.aux_optimizer = aux_optimizer
        self.sequence = order
        self.wants_raw = start == "aux"

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """Out of turn only where nothing goes from frame to frame in order."""
        return self.start == "output" and self.sequence == "event"

    def order(self, stage: int, stages: int) -> Order:
        """With AuxNets each stage learns right after its forward; else a backward waits for p_k."""
        if self.start == "aux":
            return Order(0, strict=self.sequence == "1f1b", reach=0, echo=True)
        return ORDERS[self.sequence](stage, stages)

    def reach(self, stage: int, stages: int) -> int:
        """None with AuxNets."""
        return 0 if self.start == "aux" else super().reach(stage, stages)

    def stage(self, site: Site) -> StageLearner:
        """Hands that own the boundary above the stage."""
        return AuxiliaryLearner(site, self)


class Carried:
    """What a forward leaves beside its graph.

    Attributes:
        given: what the stage learns from: its input with λ in place of what came from below.
        start: where λ of the boundary above starts; raw: the frame that an AuxNet predicted it from.
        outputs: x⁻, and dual: κ, of the learning step; until p is heard.
    """

    __slots__ = ("dual", "given", "outputs", "raw", "start")

    def __init__(self) -> None:
        self.given: Any = None
        self.start: Tensors = []
        self.raw: Any = None
        self.outputs: list[torch.Tensor] = []
        self.dual: Tensors | None = None


class AuxiliaryLearner(StageLearner):
    """A block between two boundaries; owns λ and κ of the one above.

    Attributes:
        violation: ‖λ - x⁻‖ at the boundary above after the newest sweep; None before it, and at the last stage.
        nets: the AuxNets of the boundary above, with ``start="aux"``.
    """

    def __init__(self, site: Site, rule: AuxiliaryRule) -> None:
        super().__init__(site, rule)
        self.terms = rule
        self.apart = rule.start != "output"  # learns from another input than it predicts from
        self.carried: dict[Ticket, Carried] = {}
        self.unheard: dict[Ticket, Carried] = {}
        self.scene = 0
        self.previous: Tensors | None = None  # λ as the newest frame left it
        self.dual: Tensors | None = None  # κ likewise
        self.nets: AuxNets | None = None
        if rule.start == "aux" and not self.top:
            self.nets = AuxNets(rule.aux, rule.aux_optimizer, stage=site.name, device=site.device)
            if site.exit is not None and site.example is not None:
                self.nets.build(site.example, tensors_of(site.exit))
        self._gap: torch.Tensor | None = None
        self._counting = normalizers(site)

    @property
    def violation(self) -> float | None:
        """The constraint that is left to fulfil."""
        return None if self._gap is None else float(self._gap)

    # ------------------------------------------------------------------ forward

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """The model's own forward, and with it λ for the stage above (unless λ starts at that forward's output)."""
        carried = Carried()
        if self.apart and self.site.passes_down:
            value, entry = value
            carried.given = _placed(value, entry)
            output = self._predict_only(ticket, value)
        else:
            output = super().forward(ticket, value)
            carried.given = value if self.terms.sweeps > 1 else None
        self.carried[ticket] = carried
        if self.top or not self.apart:
            return output
        carried.start = self._start(ticket, carried, tensors_of(output))
        return output, carried.start

    def _predict_only(self, ticket: Ticket, value: Any) -> Any:
        """The forward that the user sees; it leaves no graph and moves no running statistics."""
        with self.recording() if self.top else plain(), uncounted(self._counting):
            given, _ = self.boundary.enter(value)
            watched = self.boundary.watch(given)
            output = self.compute(ticket, Kept(), given)
            self.boundary.learned(watched)
            if self.top:
                ticket.loss = self.loss_of(ticket, output).detach()
        output = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output)
        return (output, ticket.loss) if self.top else output

    def _start(self, ticket: Ticket, carried: Carried, outputs: list[torch.Tensor]) -> Tensors:
        if self.nets is not None:
            carried.raw = ticket.raw
            return self.nets.predict(ticket.raw, outputs)
        if self._holds(ticket, self.previous, outputs):
            return cast(Tensors, self.previous)
        return [tensor if has_gradient(tensor) else None for tensor in outputs]

    def _holds(self, ticket: Ticket, state: Tensors | None, outputs: Sequence[torch.Tensor]) -> bool:
        """Does what an earlier frame left belong to this one's scene, and fit it?"""
        if state is None or ticket.scene != self.scene or len(state) != len(outputs):
            return False
        return all(old is None or old.shape == new.shape for old, new in zip(state, outputs, strict=True))

    # ------------------------------------------------------------------ backward

    def backward(self, ticket: Ticket, message: Any) -> Message:
        """``sweeps`` steps of this block; returns p at its entry."""
        if isinstance(message, Echo):
            self._hear(message)
        kept, carried = self.kept.pop(ticket, None) or Kept(), self.carried.pop(ticket)
        joint: Joint | None = None
        down: Message = None
        for sweep in range(self.terms.sweeps):
            if sweep or not (kept.outputs or kept.loss is not None):
                self._forward_again(ticket, kept, carried.given, counted=sweep == 0)
            if self.top:
                roots, seeds = self.roots(ticket, kept, message)
            else:
                outputs = [output.detach() for output in kept.outputs]
                with plain():
                    joint = joint or self._joint(ticket, carried, outputs)
                    roots, seeds = self.seeded(kept, self._sweep(ticket, joint, carried, outputs, message))
            down, grads = self.pull_back(roots, seeds, kept.entry, kept.weights)
            if sweep + 1 < self.terms.sweeps:
                self.learned -= 1  # it is one frame
            self.learn(ticket, kept, grads)
        if joint is not None:
            self._leave(ticket, joint, carried)
        return down

    def _forward_again(self, ticket: Ticket, kept: Kept, given: Any, *, counted: bool) -> None:
        with self.recording():
            value, kept.entry = self.boundary.enter(given)
            if counted:
                output = self.compute(ticket, kept, value)
            else:
                with uncounted(self._counting):
                    output = self.compute(ticket, kept, value)
            kept.outputs = tensors_of(output)
            if self.top:
                kept.loss = self.loss_of(ticket, output)

    def _joint(self, ticket: Ticket, carried: Carried, outputs: list[torch.Tensor]) -> Joint:
        dual = self.dual if self._holds(ticket, self.dual, outputs) else None
        if not self.apart:
            return Joint([x if has_gradient(x) else None for x in outputs], dual)
        if self.nets is None and self._holds(ticket, self.previous, outputs):
            return Joint(cast(Tensors, self.previous), dual)
        return Joint(carried.start, dual)

    def _sweep(
        self, ticket: Ticket, joint: Joint, carried: Carried, outputs: list[torch.Tensor], message: Message
    ) -> Tensors:
        """λ is corrected, where p is here already; the terminal gradient of this block; κ follows."""
        terms, scale = self.terms, ticket.scale
        if self.nets is None:
            p: Tensors = [None] * len(outputs) if message is None else message
            if not self.apart:  # what the stage above does not depend on is left alone, as by back-propagation
                joint.anchor = [None if grad is None else old for grad, old in zip(p, joint.anchor, strict=True)]
            p = [grad if grad is None or scale == 1.0 else wide(grad) / scale for grad in p]
            joint.correct(outputs, p, terms.rate, terms.beta)
        else:
            carried.outputs, carried.dual = outputs, list(joint.dual)
        pulls = joint.pull(outputs, terms.beta, scale)
        self._gap = joint.distance(outputs)
        if terms.dual_rate:
            joint.ascend(outputs, terms.dual_rate * terms.beta)
        return pulls

    def _leave(self, ticket: Ticket, joint: Joint, carried: Carried) -> None:
        """What the next frame starts from; nothing where a number is not finite."""
        with plain():
            sound = not self.rule.guard or joint.finite()
            self.scene = ticket.scene
            self.dual = list(joint.dual) if sound and self.terms.dual_rate else None
            self.previous = joint.value() if sound and self.terms.start == "previous" else None
        if self.nets is not None:
            carried.given = None
            self.unheard[ticket] = carried

    def _hear(self, echo: Echo) -> None:
        """With p of an earlier frame, the AuxNets learn to make λ - η(p + κ + β(λ - x⁻)) of that frame."""
        carried = self.unheard.pop(echo.ticket, None)
        if carried is None or self.nets is None:
            return
        terms, outputs = self.terms, carried.outputs
        with plain():
            joint = Joint(carried.start, carried.dual)
            joint.correct(outputs, echo.message or [None] * len(outputs), terms.rate, terms.beta)
            targets = joint.value()
        self.nets.learn(carried.raw, targets)

    # ------------------------------------------------------------------ life and state

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame."""
        super().drop(ticket)
        self.carried.pop(ticket, None)
        self.unheard.pop(ticket, None)

    def flush(self) -> None:
        """What has not been heard by now will not be."""
        super().flush()
        self.unheard.clear()

    def reset(self) -> None:
        """A new engine begins, which counts scenes anew: the stream goes on unless it says that it was cut."""
        super().reset()
        self.carried.clear()
        self.unheard.clear()
        self.scene = 0

    def state_dict(self) -> dict[str, Any]:
        """With λ and κ as the newest frame left them, and the AuxNets."""
        nets = None if self.nets is None else self.nets.state_dict()
        return {**super().state_dict(), "previous": self.previous, "dual": self.dual, "nets": nets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
        self.scene = 0
        self.previous = _copies(state["previous"], self.site.device)
        self.dual = _copies(state["dual"], self.site.device)
        if self.nets is not None:
            self.nets.load_state_dict(state["nets"])

    def kept_nbytes(self) -> int:
        """Bytes of graphs' ends, of λ and κ, and of the AuxNets."""
        held = super().kept_nbytes() + nbytes_of([self.previous, self.dual])
        for carried in [*self.carried.values(), *self.unheard.values()]:
            held += nbytes_of([carried.given, carried.start, carried.outputs, carried.dual])
        return held + (0 if self.nets is None else self.nets.nbytes())


def normalizers(site: Site) -> list[nn.modules.batchnorm._NormBase]:
    """The layers of a stage that keep running statistics."""
    return [
        module
        for _, root in site.modules
        for module in root.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]


@contextmanager
def uncounted(layers: Sequence[nn.modules.batchnorm._NormBase]) -> Iterator[None]:
    """In training mode, batch statistics are used but not counted: one forward of the frame counts them, and once."""
    for layer in layers:
        layer.track_running_stats = not layer.training
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _placed(value: Any, entry: Sequence[torch.Tensor | None]) -> Any:
    """``value`` with λ in place of its tensors."""
    lams = iter(entry)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        lam = next(lams)
        return leaf if lam is None else lam

    return pytree.tree_map(place, value)


def _copies(tensors: Sequence[torch.Tensor | None] | None, device: torch.device) -> Tensors | None:
    if tensors is None:
        return None
    with plain():
        return [None if tensor is None else tensor.detach().clone().to(device) for tensor in tensors]
