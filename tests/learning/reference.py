"""Sequential references that the rules are compared with: plain PyTorch, one thread, gradients that wait in queues.

    for every frame, from the last stage down:  while more than D_k graphs wait at stage k: backward of the oldest, step
    then:                                       forward through all stages, each with the weights that it has now

`fifo` is pipelined back-propagation with delay D_k at stage k, without a pipeline. `ribbon` is a small model for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

SGD = partial(torch.optim.SGD, lr=0.1)

Tensors = list[torch.Tensor]
Forward = Callable[[int, Tensors, torch.optim.Optimizer], Sequence[torch.Tensor]]
Backward = Callable[[int, Tensors, int], Sequence[torch.Tensor]]
Step = Callable[[int, Tensors, torch.optim.Optimizer], None]


def ribbon(stages: int, *, width: int = 8, inputs: int = 6, classes: int = 4, seed: int = 1) -> nn.Sequential:
    """Two layers (linear, tanh) for each stage: what `pieces` cuts; always the same weights for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [inputs, *[width] * (stages - 1), classes]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers)


def pieces(model: nn.Sequential, balance: Sequence[int]) -> list[nn.Module]:
    """Slices of ``model`` with so many layers each; they share its parameters and keep its keys."""
    found, at = [], 0
    for size in balance:
        found.append(model[at : at + size])
        at += size
    return found


def stream(frames: int, *, inputs: int = 6, classes: int = 4, seed: int = 2) -> tuple[Tensors, Tensors]:
    """(frames of shape (1, inputs), targets of shape (1,))."""
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(frames, 1, inputs, generator=generator)
    ys = torch.randint(0, classes, (frames, 1), generator=generator)
    return list(xs), list(ys)


def fifo(
    model_parts: Sequence[nn.Module],
    frames: Sequence[torch.Tensor],
    targets: Sequence[Any],
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    delays: Sequence[int] | Callable[[int], Sequence[int]],
    *,
    weights: Literal["stashed", "current", "recomputed"] = "stashed",
    every: int = 1,
    forward: Forward | None = None,
    backward_reads: Backward | None = None,
    step: Step | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train ``model_parts`` in place, stage k with gradients that are ``delays[k]`` frames late.

    Args:
        model_parts: the stages, from the input on; a part without parameters has no optimizer.
        frames: what goes into the first.
        targets: what the loss compares with.
        loss: ``loss(output, target)``.
        optimizer: ``params -> Optimizer``, one per part.
        delays: per part, or for each frame number per part; from the input on they must not grow.
        weights: of the backward: "stashed", those of the forward; "current", the newest in the graph of the forward;
            "recomputed", the newest in a graph made anew from the kept input.
        every: gradients averaged into one step.
        forward: ``(k, params, optimizer) -> tensors`` that the forward reads in place of the parameters.
        backward_reads: ``(k, params, steps since the forward) -> tensors`` that the backward of that graph reads.
        step: ``(k, params, optimizer)``: in place of ``optimizer.step()``; the gradients are in ``.grad``.

    Returns:
        The loss of each frame, and the parts' state under their own keys.
    """
    parts = list(model_parts)
    names = [[name for name, _ in part.named_parameters()] for part in parts]
    params: list[Tensors] = [[p for _, p in part.named_parameters()] for part in parts]
    optimizers = [optimizer(own) if own else None for own in params]
    steps = [0] * len(parts)
    waiting: list[deque[tuple[int, torch.Tensor, torch.Tensor, Tensors, int]]] = [deque() for _ in parts]
    messages: dict[int, torch.Tensor | None] = {}  # by frame, on its way down
    gathered: list[list[Tensors]] = [[] for _ in parts]
    losses: list[float] = []

    def call(k: int, tensors: Sequence[torch.Tensor], x: torch.Tensor, t: int) -> torch.Tensor:
        y = torch.func.functional_call(parts[k], dict(zip(names[k], tensors, strict=True)), (x,))
        return y if k + 1 < len(parts) else loss(y, targets[t])

    def read(k: int) -> Tensors:
        own = params[k]
        optimizer_of = optimizers[k]
        if forward is not None and optimizer_of is not None:
            return [tensor.detach().clone().requires_grad_() for tensor in forward(k, own, optimizer_of)]
        return [p.data.clone().requires_grad_() if weights == "stashed" else p.data.requires_grad_() for p in own]

    def backward(k: int) -> None:
        t, x, y, used, before = waiting[k].popleft()
        read = params[k] if backward_reads is None else backward_reads(k, params[k], steps[k] - before)
        if weights == "recomputed":
            used = [tensor.detach().clone().requires_grad_() for tensor in read]
            y = call(k, used, x, t)
        elif backward_reads is not None:  # the graph's own storage: nobody else reads it
            for tensor, value in zip(used, read, strict=True):
                tensor.data.copy_(value.detach())
        seed = messages.pop(t, None)
        found = torch.autograd.grad(y, [x, *used] if k > 0 else used, seed)
        if k > 0:
            messages[t], found = found[0], found[1:]
        gathered[k].append(list(found))
        if len(gathered[k]) < every or optimizers[k] is None:
            return
        for p, *grads in zip(params[k], *gathered[k], strict=True):
            p.grad = sum(grads[1:], grads[0]) / every if every > 1 else grads[0]
        gathered[k].clear()
        optimizer_of = optimizers[k]
        assert optimizer_of is not None
        steps[k] += 1
        if step is None:
            optimizer_of.step()
        else:
            step(k, params[k], optimizer_of)

    for t, frame in enumerate(frames):
        now = delays(t) if callable(delays) else delays
        assert list(now) == sorted(now, reverse=True)
        for k in reversed(range(len(parts))):
            while len(waiting[k]) > now[k]:
                backward(k)
        x = frame.detach()
        for k in range(len(parts)):
            x = x.detach().requires_grad_(k > 0)
            used = read(k)
            y = call(k, used, x, t)
            waiting[k].append((t, x, y, used, steps[k]))
            x = y
        losses.append(float(x.detach()))
    for _ in frames:
        for k in reversed(range(len(parts))):
            if waiting[k] and (k + 1 == len(parts) or waiting[k][0][0] in messages):
                backward(k)
    assert not any(waiting)
    return losses, {key: tensor for part in parts for key, tensor in part.state_dict().items()}


def batches(
    stages: int, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], sizes: Sequence[int], optimizer: Any = SGD
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain training on batches of these sizes: the loss of each frame, and the weights."""
    model, losses, at = ribbon(stages), [], 0
    stepper = optimizer(model.parameters())
    for size in sizes:
        output = model(torch.cat(list(xs[at : at + size])))
        each = functional.cross_entropy(output, torch.cat(list(ys[at : at + size])), reduction="none")
        losses += each.tolist()
        stepper.zero_grad()
        torch.autograd.backward(each.mean())
        stepper.step()
        at += size
    assert at == len(xs)
    return losses, dict(model.state_dict())
