"""A sequential reference for rules whose losses lie a few stages up: plain PyTorch, the whole graph of a frame at once.

for every frame:   stage k takes the steps that are due, so that at most D_k = min(n-1, S-1-k) are missing
                   one forward through all stages and heads, with the weights that they have now
                   stage k's step: ∂L_m/∂θ_k, m = min(k+n-1, S-1), its head's: ∂L_k/∂φ_k

`assisted` is pipelined back-propagation through queues, with a local loss at each stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from aiotime.learning.heads import default_head


def heads_for(parts: Sequence[nn.Module], x: torch.Tensor, *, seed: int = 0) -> list[nn.Module]:
    """The default head of every part but the last."""
    with torch.no_grad():
        cuts = [x := part(x) for part in parts]
    return [default_head(cut, cuts[-1], seed=seed, stage=k) for k, cut in enumerate(cuts[:-1])]


def windowed(
    parts: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    n: int,
    own: bool = False,
) -> list[float]:
    """Train ``parts`` and ``heads`` in place; returns the model's loss of each frame.

    Args:
        parts: the stages, from the input on.
        heads: of all stages but the last.
        frames: what goes into the first.
        targets: one for each.
        loss: ``(output, target) -> 0-dim tensor``.
        optimizer: ``params -> Optimizer``, one per stage.
        n: stages that a gradient passes through.
        own: the gradient of a stage's own loss is added.
    """
    last = len(parts) - 1
    headed = [k < last and (own or k >= n - 1) for k in range(last + 1)]
    params = [list(part.parameters()) for part in parts]
    tops = [list(heads[k].parameters()) if headed[k] else [] for k in range(last + 1)]
    optimizers = [optimizer(body + top) for body, top in zip(params, tops, strict=True)]
    waiting: list[deque[list[torch.Tensor]]] = [deque() for _ in parts]
    losses = []

    def step(k: int) -> None:
        for p, grad in zip(params[k] + tops[k], waiting[k].popleft(), strict=True):
            p.grad = grad
        optimizers[k].step()

    for x, y in zip(frames, targets, strict=True):
        for k in range(last + 1):
            while len(waiting[k]) > min(n - 1, last - k):
                step(k)
        found = []
        h = x
        for k, part in enumerate(parts):
            h = part(h)
            found.append(loss(h if k == last else heads[k](h), y))
        losses.append(float(found[-1].detach()))
        for k in range(last + 1):
            grads = list(torch.autograd.grad(found[min(k + n - 1, last)], params[k], retain_graph=True))
            if own and k < last:
                mine = torch.autograd.grad(found[k], params[k], retain_graph=True)
                grads = [a + b for a, b in zip(grads, mine, strict=True)]
            if headed[k]:
                grads += torch.autograd.grad(found[k], tops[k], retain_graph=True)
            waiting[k].append(grads)
    for k in range(last + 1):
        while waiting[k]:
            step(k)
    return losses


def assisted(
    parts: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    share: float,
    fresh: bool = False,
    blind: bool = False,
) -> list[float]:
    """Pipelined back-propagation, S-1-k late at stage k, with ``share`` times the loss of each head beside it.

    The graph of a stage is that of its forward, with the weights it had then; its head is evaluated when the gradient
    from above has come, with the weights it has then. Trains ``parts`` and ``heads``; returns the model's losses.

    Args:
        parts: the stages, from the input on.
        heads: of all stages but the last.
        frames: what goes into the first.
        targets: one for each.
        loss: ``(output, target) -> 0-dim tensor``.
        optimizer: ``params -> Optimizer``, one per stage.
        share: factor on the heads' losses.
        fresh: a head is evaluated with the forward, for the weights alone; its gradient goes into the next update.
        blind: a head is made with the stage's first backward; frames before that have no fresh gradient.
    """
    last = len(parts) - 1
    params = [dict(part.named_parameters()) for part in parts]
    tops = [list(heads[k].parameters()) if k < last else [] for k in range(last + 1)]
    optimizers = [optimizer([*own.values(), *top]) for own, top in zip(params, tops, strict=True)]
    waiting: list[deque[tuple[int, torch.Tensor, torch.Tensor, list[torch.Tensor]]]] = [deque() for _ in parts]
    messages: dict[int, torch.Tensor] = {}
    newest: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in parts]
    losses = []

    def backward(k: int) -> None:
        t, x, y, used = waiting[k].popleft()
        roots, seeds = [y], [messages.pop(t, None)]
        if k < last and (not fresh or (blind and t <= last - k)):
            roots.append(loss(heads[k](y), targets[t]))
            seeds.append(torch.tensor(share))
        found: Sequence[Any] = torch.autograd.grad(roots, [x, *used, *tops[k]], seeds, allow_unused=True)
        messages[t] = found[0]
        for at, (p, grad) in enumerate(zip([*params[k].values(), *tops[k]], found[1:], strict=True)):
            terms = [extra[at] for extra in newest[k]] + ([] if grad is None else [grad])
            p.grad = torch.stack(terms).sum(0) if terms else None
        newest[k].clear()
        optimizers[k].step()

    for t, frame in enumerate(frames):
        for k in reversed(range(last + 1)):
            while len(waiting[k]) > last - k:
                backward(k)
        y = frame
        for k, part in enumerate(parts):
            x = y.detach().requires_grad_()
            used = {name: p.detach().clone().requires_grad_() for name, p in params[k].items()}
            y = torch.func.functional_call(part, used, (x,))
            if k == last:
                y = loss(y, targets[t])
            elif fresh and not (blind and t <= last - k):
                guess = share * loss(heads[k](y), targets[t])
                newest[k].append(torch.autograd.grad(guess, [*used.values(), *tops[k]], retain_graph=True))
            waiting[k].append((t, x, y, list(used.values())))
        losses.append(float(y.detach()))
    for _ in frames:
        for k in reversed(range(last + 1)):
            if waiting[k] and (k == last or waiting[k][0][0] in messages):
                backward(k)
    return losses
