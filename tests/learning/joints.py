"""Sequential references for rules that join blocks by auxiliary variables, and a run to compare with them.

swept    one frame after the other, from the top down: λ moves, the block below learns, κ follows
aided    every block by itself, λ from an AuxNet, which hears of a frame when the next one is learned from
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import aiotime
from aiotime import Sample
from aiotime.learning import Rule

PATIENCE = 20.0
Loss = Callable[..., torch.Tensor]


class Recorder(torch.optim.Optimizer):
    """Writes gradients down and leaves the weights as they are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})
        self.grads: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One more entry in ``grads``."""
        self.grads.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


@dataclass
class Course:
    """What came of a run."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    delays: list[tuple[int, ...]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    hands: list[Any] = field(default_factory=list)


async def build(
    rule: Rule, model: nn.Module, balance: Sequence[int], example: Any, devices: Sequence[Any] | None = None
) -> aiotime.Pipeline:
    """A pipeline that learns, made off the loop."""
    return await asyncio.to_thread(
        aiotime.Pipeline,
        model,
        example=example,
        devices=list(devices or ["inline"] * len(balance)),
        balance=list(balance),
        learner=rule,
    )


async def follow(
    pipeline: aiotime.Pipeline,
    frames: Sequence[Any],
    targets: Sequence[Any],
    *,
    cuts: Collection[int] = (),
    watch: Callable[[list[Any]], None] | None = None,
) -> Course:
    """Run the whole stream through it."""
    course = Course(hands=[spec.hands for spec in pipeline._specs])
    samples = [Sample(x, y, cut=at in cuts) for at, (x, y) in enumerate(zip(frames, targets, strict=True))]
    async with asyncio.timeout(PATIENCE):
        async for prediction in pipeline.run(samples):
            assert prediction.loss is not None and prediction.delay is not None
            course.outputs.append(prediction.output)
            course.losses.append(prediction.loss)
            course.delays.append(prediction.delay)
            if watch is not None:
                watch(course.hands)
    course.state = pipeline.state_dict()
    return course


async def learn(
    rule: Rule,
    model: nn.Module,
    balance: Sequence[int],
    frames: Sequence[Any],
    targets: Sequence[Any],
    *,
    devices: Sequence[Any] | None = None,
    cuts: Collection[int] = (),
) -> Course:
    """Build and follow."""
    return await follow(await build(rule, model, balance, frames[0], devices), frames, targets, cuts=cuts)


def close(course: Course, losses: Sequence[float], state: dict[str, torch.Tensor]) -> None:
    """To rounding."""
    torch.testing.assert_close(course.losses, list(losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(course.state, state, rtol=1e-4, atol=1e-5)


def same(one: Course, other: Course) -> bool:
    """Bit for bit."""
    return one.losses == other.losses and all(torch.equal(one.state[key], other.state[key]) for key in one.state)


def swept(
    parts: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Loss,
    *,
    lr: float,
    beta: float,
    rate: float,
    dual_rate: float = 0.0,
    previous: bool = False,
    sweeps: int = 1,
    cuts: Collection[int] = (),
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train ``parts`` in place by plain gradient descent; losses of the model's own forward, and its state."""
    top = len(parts) - 1
    lam: list[torch.Tensor | None] = [None] * len(parts)  # at the boundary below each part
    kappa: list[torch.Tensor | None] = [None] * len(parts)
    losses = []
    for t, (frame, target) in enumerate(zip(frames, targets, strict=True)):
        if t in cuts:
            lam, kappa = [None] * len(parts), [None] * len(parts)
        chain = [frame]
        with torch.no_grad():
            for part in parts:
                chain.append(part(chain[-1]))
            losses.append(float(loss(chain[-1], target)))
        entries = [chain[k] if old is None else old for k, old in enumerate(lam)]
        p = torch.zeros(())
        for k in reversed(range(len(parts))):
            above = None if k == top else entries[k + 1]
            multiplier = None if k == top else kappa[k + 1]
            for _ in range(sweeps):
                leaf = entries[k].clone().requires_grad_()
                x = parts[k](leaf)
                objective = loss(x, target) if above is None else x
                seed = None
                if above is not None:
                    gap = above - x.detach()
                    multiplier = torch.zeros_like(gap) if multiplier is None else multiplier
                    above = above - rate * (p + multiplier + beta * gap)
                    gap = above - x.detach()
                    seed = -(multiplier + beta * gap)
                    multiplier = multiplier + dual_rate * beta * gap
                grads = torch.autograd.grad(objective, [leaf, *parts[k].parameters()], seed)
                descend(parts[k], grads[1:], lr)
            if k < top:
                lam[k + 1] = above if previous else None
                kappa[k + 1] = multiplier if dual_rate else None
            p = grads[0]
    return losses, state_of(parts)


def aided(
    parts: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Loss,
    *,
    lr: float,
    beta: float,
    rate: float,
    dual_rate: float = 0.0,
    aux_lr: float = 1e-3,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same where every part learns right after its forward, with linear AuxNets trained by Adam."""
    top = len(parts) - 1
    with torch.no_grad():
        widths = [x.shape[1] for x in [frames[0]]]
        x = frames[0]
        for part in parts:
            x = part(x)
            widths.append(x.shape[1])
    nets = [nn.Linear(widths[0], widths[k + 1]) for k in range(top)]
    for net in nets:
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
    adams = [torch.optim.Adam(net.parameters(), lr=aux_lr) for net in nets]
    kappa: list[torch.Tensor | None] = [None] * top  # at the boundary above each part
    told: list[tuple[torch.Tensor, ...] | None] = [None] * top  # (frame, λ, x⁻, κ) of the frame before
    down: list[torch.Tensor | None] = [None] * len(parts)  # p of each part for the frame before
    losses = []
    for frame, target in zip(frames, targets, strict=True):
        chain, entry, now = frame, frame, list(down)
        for k, part in enumerate(parts):
            with torch.no_grad():
                chain = part(chain)
                lam = None if k == top else nets[k](frame)
            if k == top:
                losses.append(float(loss(chain, target)))
            elif (heard := told[k]) is not None:  # the AuxNet learns of the frame before
                raw, old, x_old, multiplier = heard
                p = down[k + 1]
                assert p is not None
                wanted = old - rate * (p + multiplier + beta * (old - x_old))
                adams[k].zero_grad()
                nn.functional.mse_loss(nets[k](raw), wanted).backward()  # type: ignore[no-untyped-call]
                adams[k].step()
            leaf = entry.clone().requires_grad_()
            x = part(leaf)
            if lam is None:
                grads = torch.autograd.grad(loss(x, target), [leaf, *part.parameters()])
            else:
                gap = lam - x.detach()
                old_kappa = kappa[k]
                multiplier = torch.zeros_like(gap) if old_kappa is None else old_kappa
                grads = torch.autograd.grad(x, [leaf, *part.parameters()], -(multiplier + beta * gap))
                kappa[k] = multiplier + dual_rate * beta * gap
                told[k] = (frame, lam, x.detach(), multiplier)
            descend(part, grads[1:], lr)
            now[k] = grads[0]
            entry = chain if lam is None else lam
        down = now
    return losses, state_of(parts)


def descend(part: nn.Module, grads: Sequence[torch.Tensor], lr: float) -> None:
    """θ ← θ - lr·g."""
    with torch.no_grad():
        for parameter, grad in zip(part.parameters(), grads, strict=True):
            parameter.sub_(lr * grad)


def state_of(parts: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """All parts' tensors under the model's keys."""
    return {key: tensor for part in parts for key, tensor in part.state_dict().items()}
