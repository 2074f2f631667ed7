"""BlockADMM: blocks joined by z_k and scaled duals u_k, each solved by a few proximal steps, or exactly at the top.

stage k, once its target τ = z_{k+1} - u_{k+1} is here          (last stage: the model's target)

    z_k:  ρ/2‖z - x_k⁻ - u_k‖² + ℓ_k(f_k(z; θ_k))       ─▶ z_k - u_k, sent down as z_k - u_k - x_k⁻
    u_k ← u_k + x_k⁻ - z_k
    θ_k:  μ/2‖θ - θ_k‖² + ℓ_k(f_k(z_k; θ))              ─▶ new weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError
from aiotime.learning.auxiliary import ORDERS, Sequencing, normalizers, uncounted
from aiotime.learning.boundary import nbytes_of, tensors_of
from aiotime.learning.joint import Joint, Tensors, plain, wide
from aiotime.learning.learner import Kept, Message, Site, StageLearner
from aiotime.learning.order import Order
from aiotime.learning.rule import Rule
from aiotime.learning.settings import whole_number
from aiotime.learning.ticket import Ticket


class BlockADMM(Rule):
    """Stochastic block-ADMM (Khorram et al. 2021, arXiv 2105.00339), in the scaled form of Boyd et al. 2011, ch. 3.1.1.

    min loss(f_{S-1}(z_{S-1})) subject to z_k = x_k⁻ = f_{k-1}(z_{k-1}); with residual r_k = x_k⁻ - z_k the augmented
    Lagrangian is loss + Σ_k (ρ/2)‖r_k + u_k‖² - (ρ/2)‖u_k‖². All of z_k, u_k, x_k⁻ have the shape of what crosses the
    boundary below stage k, which owns them. From the top down, with ℓ_k(y) = (ρ/2)‖y - τ‖² for τ = z_{k+1} - u_{k+1},
    and the loss at the last stage:

        z_k ← argmin_z  ℓ_k(f_k(z; θ_k)) + (ρ/2)‖z - x_k⁻ - u_k‖²        n gradient steps of size η from z = x_k⁻
        u_k ← u_k + x_k⁻ - z_k                                           from frame to frame, until the scene is cut
        θ_k ← argmin_θ  ℓ_k(f_k(z_k; θ)) + (μ/2)‖θ - θ_k‖²               n steps of the stage's optimizer

    With n = 1 and ηρ = 1 the target is z_k - u_k = x_k⁻ - p_k/ρ (p_k: gradient of ℓ_k at the entry), so that stage k-1
    receives p_k; its block then learns at its own z. ``exact_top``: where the last stage is one nn.Linear and the loss
    a mean or sum of squares, both problems there are solved exactly (as the layers of Taylor et al. 2016, arXiv
    1605.02026, are), without optimizer. z, u and τ cost three boundary tensors; a frame costs 2n forwards and backwards
    more than the forward that predicts. Delay as of `Delayed`, at most S-1-k, weights newest.

    Args:
        rho: ρ. Large: close to back-propagation.
        rate: η; None: 1/ρ.
        inner_steps: n, for z and θ alike.
        prox: μ, how far the weights stay at those of the frame before; 0: not at all.
        exact_top: see above; needs prox > 0, else one frame would undo all before it.
        order: "event", or "1f1b": the same bits on every run.
        **settings: those of `aiotime.learning.rule.Rule`, without ``update_every``.
    """

    stashes = False

    def __init__(
        self,
        *,
        rho: float,
        rate: float | None = None,
        inner_steps: int = 1,
        prox: float = 0.0,
        exact_top: bool = False,
        order: Sequencing = "event",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not (rho > 0 and math.isfinite(rho)):
            raise ConfigurationError(f"rho, the weight of the constraint, must be positive, not {rho}")
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ConfigurationError(f"rate, the step of the auxiliary variables, must be positive, not {rate}")
        whole_number("inner_steps", inner_steps, "a number of steps")
        if not (prox >= 0 and math.isfinite(prox)):
            raise ConfigurationError(f"prox must not be negative, not {prox}")
        if order not in ORDERS:
            raise ConfigurationError(f'order must be "event" or "1f1b", not {order!r}')
        if self.precision is torch.float16:
            raise ConfigurationError("BlockADMM scales no loss; use precision=torch.bfloat16")
        if self.update_every != 1:
            raise ConfigurationError("BlockADMM solves a problem per frame; leave out update_every")
        if exact_top and (prox == 0.0 or _squares(self.loss) is None):
            raise ConfigurationError(
                "exact_top=True needs prox > 0 and a loss that is torch.nn.functional.mse_loss or torch.nn.MSELoss "
                'with reduction "mean" or "sum"'
            )
        self.rho = rho
        self.rate = 1.0 / rho if rate is None else rate
        self.inner_steps = inner_steps
        self.prox = prox
        self.exact_top = exact_top
        self.sequence = order

    @property
    def accepts_late(self) -> bool:  # type: ignore[override]
        """A strict order counts."""
        return self.sequence == "event"

    def order(self, stage: int, stages: int) -> Order:
        """A block waits for its target from above."""
        return ORDERS[self.sequence](stage, stages)

    def stage(self, site: Site) -> StageLearner:
        """Hands that own the boundary below the stage."""
        return BlockLearner(site, self)


class BlockLearner(StageLearner):
    """One block and the boundary below it.

    Attributes:
        residual: ‖x⁻ - z‖ of the newest frame; None before it, and where nothing learns below.
    """

    def __init__(self, site: Site, rule: BlockADMM) -> None:
        super().__init__(site, rule)
        self.terms = rule
        self.stash = False
        self.inputs: dict[Ticket, Any] = {}
        self.scene = 0
        self.dual: Tensors | None = None  # u
        self._residual: torch.Tensor | None = None
        self._counting = normalizers(site)
        self._linear = _only_linear(site) if rule.exact_top and self.top else None

    @property
    def residual(self) -> float | None:
        """The constraint that is left to fulfil."""
        return None if self._residual is None else float(self._residual)

    def forward(self, ticket: Ticket, value: Any) -> Any:
        """The model's own; its graph serves the first step."""
        output = super().forward(ticket, value)
        self.inputs[ticket] = value
        return output

    def backward(self, ticket: Ticket, message: Message) -> Message:
        """The entry z, its dual, and the weights; returns z - u - x⁻ to the stage below, which has x⁻ itself."""
        value, kept = self.inputs.pop(ticket), self.kept.pop(ticket)
        if self.top and kept.loss is None:  # the target came late
            self.roots(ticket, kept, None)
        target = Joint([y.detach() for y in kept.outputs], None)  # τ = y + what the stage above sent
        target.moved = [None] * len(kept.outputs) if message is None else list(message)
        down: Message = None
        fresh = kept
        if self.site.passes_down:
            entry = [leaf.detach() for leaf in kept.entry]  # x⁻
            with plain():
                dual = self._dual_for(ticket, entry)
                moved = self._solve_entry(ticket, kept, value, entry, dual, target)
                down = [d if d is None or u is None else d - u for d, u in zip(moved, dual, strict=True)]
                self._follow(ticket, moved, dual)
                value, fresh = _moved(value, moved), Kept()
        self._solve_weights(ticket, fresh, value, target)
        self.learned += 1
        return down

    # ------------------------------------------------------------------ the two problems

    def _solve_entry(
        self, ticket: Ticket, kept: Kept, value: Any, entry: list[torch.Tensor], dual: Tensors, target: Joint
    ) -> Tensors:
        """Per tensor, d = z - x⁻; None for what has no z."""
        terms = self.terms
        if self._linear is not None:
            return [_exact_entry(self._linear, self._weights_of_squares(ticket), entry[0], dual[0], terms.rho)]
        differentiable = [leaf.requires_grad for leaf in kept.entry]
        moved: Tensors = [None] * len(entry)
        for step in range(terms.inner_steps):
            if step:
                self._evaluate(ticket, kept, _moved(value, moved))
            roots, seeds = self._terms(kept, target)
            p, _ = self.pull_back(roots, seeds, kept.entry, [])
            for at, grad in enumerate(p or []):
                if differentiable[at]:
                    moved[at] = self._nearer(entry[at], moved[at], dual[at], grad)
        return moved

    def _nearer(
        self, x: torch.Tensor, d: torch.Tensor | None, u: torch.Tensor | None, grad: torch.Tensor | None
    ) -> torch.Tensor:
        """One step: d ← d - η(p + ρ(d - u))."""
        d = torch.zeros_like(wide(x)) if d is None else d
        slope = self.terms.rho * (d if u is None else d - u)
        return d - self.terms.rate * (slope if grad is None else slope + wide(grad))

    def _solve_weights(self, ticket: Ticket, kept: Kept, value: Any, target: Joint) -> None:
        """θ, by the stage's optimizer or exactly; ``kept``: a graph at ``value``, where there is one."""
        updater, terms = self.updater, self.terms
        if updater is None:
            return
        if self._linear is not None:
            with plain():
                self._fit(tensors_of(value)[0], self._weights_of_squares(ticket))
            return
        anchors = self.weights.snapshot() if terms.prox and terms.inner_steps > 1 else None
        for step in range(terms.inner_steps):
            if step or not kept.weights:
                self._evaluate(ticket, kept, value)
            roots, seeds = self._terms(kept, target)
            _, grads = self.pull_back(roots, seeds, kept.entry, kept.weights)
            if anchors is not None:
                grads = self._held(grads, anchors)
            updater.add(grads)
            self.update()

    def _held(self, grads: list[torch.Tensor | None], anchors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradients with that of μ/2‖θ - θ_k‖²."""
        with plain():
            return [
                grad if grad is None else grad + self.terms.prox * (master.detach() - anchor)
                for grad, master, anchor in zip(grads, self.weights.masters, anchors, strict=True)
            ]

    def _evaluate(self, ticket: Ticket, kept: Kept, value: Any) -> None:
        """The block's function at ``value``, with a graph."""
        with self.recording(), uncounted(self._counting):
            given, kept.entry = self.boundary.enter(value)
            output = self.compute(ticket, kept, given)
            kept.outputs = tensors_of(output)
            if self.top:
                kept.loss = self.loss_of(ticket, output)

    def _terms(self, kept: Kept, target: Joint) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The loss, or the outputs with ρ(y - τ)."""
        if self.top:
            assert kept.loss is not None
            return [kept.loss], [None]
        with plain():
            seeds = target.pull([y.detach() for y in kept.outputs], self.terms.rho)
        sent = [None if moved is None else seed for moved, seed in zip(target.moved, seeds, strict=True)]
        return self.seeded(kept, sent)

    # ------------------------------------------------------------------ exactly, at the top

    def _weights_of_squares(self, ticket: Ticket) -> tuple[float, torch.Tensor]:
        """(c, target) of loss = c‖y - target‖²."""
        assert self._linear is not None
        (target,) = tensors_of(ticket.target)
        target = target.to(self.site.device, self._linear.weight.dtype)
        return (1.0 / target.numel() if _squares(self.rule.loss) == "mean" else 1.0), target

    def _fit(self, z: torch.Tensor, squares: tuple[float, torch.Tensor]) -> None:
        """argmin_W,b  c‖Z Wᵀ + b - Y‖² + μ/2‖(W, b) - (W, b)_now‖²."""
        assert self._linear is not None
        (c, target), mu = squares, self.terms.prox
        masters = self.weights.masters  # weight, and bias where there is one
        rows = z.reshape(-1, z.shape[-1])  # Z: (n, d)
        wanted = target.reshape(rows.shape[0], -1)  # Y: (n, m)
        if len(masters) == 2:
            rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)  # (n, d + 1)
            now = torch.cat([masters[0], masters[1][:, None]], dim=1)  # (m, d + 1)
        else:
            now = masters[0]
            if self._linear.bias is not None:  # frozen
                wanted = wanted - self._linear.bias.detach()
        system = 2 * c * rows.T @ rows + mu * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        found = torch.linalg.solve(system, 2 * c * rows.T @ wanted + mu * now.T).T  # (m, d + 1)
        if self.rule.guard and not bool(found.isfinite().all()):
            return

        def write() -> None:
            with torch.no_grad():
                masters[0].copy_(found[:, : masters[0].shape[1]])
                if len(masters) == 2:
                    masters[1].copy_(found[:, -1])

        self.weights.update(write, keep_old=False)

    # ------------------------------------------------------------------ duals, life and state

    def _dual_for(self, ticket: Ticket, entry: Sequence[torch.Tensor]) -> Tensors:
        old = self.dual
        fits = old is not None and ticket.scene == self.scene and len(old) == len(entry)
        if not fits or any(u is not None and u.shape != x.shape for u, x in zip(old or [], entry, strict=True)):
            return [None] * len(entry)
        assert old is not None
        return old

    def _follow(self, ticket: Ticket, moved: Tensors, dual: Tensors) -> None:
        """The duals: u ← u + x⁻ - z."""
        following = [d if d is None else -d if u is None else u - d for d, u in zip(moved, dual, strict=True)]
        sound = not self.rule.guard or all(u is None or bool(u.isfinite().all()) for u in following)
        self.dual, self.scene = following if sound else None, ticket.scene
        self._residual = torch.nn.utils.get_total_norm([d for d in moved if d is not None])

    def drop(self, ticket: Ticket) -> None:
        """Forget the frame."""
        super().drop(ticket)
        self.inputs.pop(ticket, None)

    def reset(self) -> None:
        """A new engine begins, which counts scenes anew: the stream goes on unless it says that it was cut."""
        super().reset()
        self.inputs.clear()
        self.scene = 0

    def state_dict(self) -> dict[str, Any]:
        """With u as the newest frame left it."""
        return {**super().state_dict(), "dual": self.dual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
        self.scene = 0
        given: Tensors | None = state["dual"]
        with plain():
            device = self.site.device
            self.dual = None if given is None else [None if u is None else u.detach().clone().to(device) for u in given]

    def kept_nbytes(self) -> int:
        """Bytes of graphs' ends and duals."""
        return super().kept_nbytes() + nbytes_of(self.dual)


def _moved(value: Any, moved: Sequence[torch.Tensor | None]) -> Any:
    """``value`` with z = x⁻ + d in place of the tensors that have one."""
    steps = iter(moved)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        d = next(steps)
        return leaf if d is None else (wide(leaf) + d).to(leaf.dtype)

    return pytree.tree_map(move, value)


def _squares(loss: Any) -> str | None:
    """The reduction of a sum of squares; None for any other loss."""
    if loss is nn.functional.mse_loss:
        return "mean"
    if type(loss) is nn.MSELoss and loss.reduction in ("mean", "sum"):
        return str(loss.reduction)
    return None


def _only_linear(site: Site) -> nn.Linear:
    """The one layer of the stage."""
    layers = [m for _, root in site.modules for m in root.modules() if next(m.children(), None) is None]
    if len(layers) != 1 or type(layers[0]) is not nn.Linear or not layers[0].weight.requires_grad:
        kinds = ", ".join(type(layer).__name__ for layer in layers) or "functions"
        raise ConfigurationError(
            f"exact_top=True needs a last stage that is one trainable nn.Linear; {site.name!r} has {kinds}. "
            "Cut before the last layer (balance=[..., 1]) or leave exact_top out"
        )
    layer = layers[0]
    if site.entry is not None:
        given, made = tensors_of(site.entry), tensors_of(site.exit)
        with plain():
            same = len(given) == len(made) == 1 and torch.allclose(made[0], layer(given[0]), rtol=1e-3)
        if not same:
            raise ConfigurationError(
                f"exact_top=True needs a last stage that is one nn.Linear and nothing else; {site.name!r} computes more"
            )
    return layer


def _exact_entry(
    linear: nn.Linear, squares: tuple[float, torch.Tensor], x: torch.Tensor, u: torch.Tensor | None, rho: float
) -> torch.Tensor:
    """What takes x⁻ to argmin_z  c‖z Wᵀ + b - Y‖² + ρ/2‖z - x⁻ - u‖², row by row."""
    c, target = squares
    weight = linear.weight.detach()  # (m, d)
    lift = (x if u is None else x + u).reshape(-1, weight.shape[1])  # (n, d)
    wanted = target.reshape(lift.shape[0], -1)  # (n, m)
    if linear.bias is not None:
        wanted = wanted - linear.bias.detach()
    system = 2 * c * weight.T @ weight + rho * torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    z: torch.Tensor = torch.linalg.solve(system, (2 * c * wanted @ weight + rho * lift).T).T
    return z.reshape(x.shape) - x
